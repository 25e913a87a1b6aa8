# SPDX-License-Identifier: Apache-2.0
"""Every kind of kernel compiles for Hopper, by Triton's own compiler."""

import re

import pytest

pytest.importorskip("triton")

from .hopper import compile_all

CALL = """
from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.op import triton_backend
from vllm_rsparse.testing.cases import make_case

def call(case):
    sizes, ranks = ((1024,), (0,))
    if case["factors"]:
        sizes, ranks = ((1024, 256, 512), (48, 0, 16))
    # 16 columns more: a last tile that is not full, rows that stay aligned.
    sizes = (*sizes[:-1], sizes[-1] + (0 if case["even"] else 16))
    rsparse_linear._extent = lambda matrix: 2**31 if case["wide"] else 1
    made = make_case(case["tokens"], 512, sizes, ranks, torch.bfloat16)
    triton_backend.rsparse_linear(*made.args(), LaunchConfig(**case["config"]))
"""

COMMON = {"block_n": 256, "split_k": 4, "num_warps": 2, "num_stages": 2}
LISTED = COMMON | {"block_k": 16, "use_dot": False, "listed": True}
MASKED = COMMON | {"block_k": 16, "use_dot": False}
DOT = COMMON | {"block_k": 32, "use_dot": True}
CASES = {
    f"{name}{'-factors' if factors else ''}": {
        "config": config,
        "tokens": tokens,
        "even": even,
        "wide": not even,
        "factors": factors,
    }
    for name, config, tokens, even in (
        ("listed", LISTED, 1, True),
        ("listed-uneven", LISTED, 2, False),
        ("masked", MASKED, 1, True),
        ("masked-uneven", MASKED, 2, False),
        ("dot", DOT, 8, True),
    )
    for factors in (False, True)
}
CASES["direct"] = {**CASES["masked"], "config": MASKED | {"split_k": 1}}
# A row of the weight read with 16 bytes a thread, or it takes eight times the
# instructions.
WIDE_LOAD = r"ld\.global\.L1::evict_first\S*\.v4\.b32"


@pytest.fixture(scope="module")
def launches() -> dict[str, dict[str, str]]:
    """By case, the launches of a call: name to PTX. One process compiles them all."""
    made = compile_all(CALL, list(CASES.values()))
    return dict(zip(CASES, made, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_compiles(launches: dict[str, dict[str, str]], name: str) -> None:
    # Nothing is split, and there are no factors: one launch writes the output.
    direct = name == "direct"
    expected = {"sums_kernel"} if direct else {"sums_kernel", "finish_kernel"}
    assert set(launches[name]) == expected
    if not CASES[name]["config"]["use_dot"]:
        assert re.search(WIDE_LOAD, launches[name]["sums_kernel"])
