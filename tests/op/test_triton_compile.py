# SPDX-License-Identifier: Apache-2.0
"""Every kind of kernel compiles for Hopper; needs no GPU, only Triton's own compiler.

The interpreter runs Python, which accepts what the compiler does not. A child process
calls the launcher on tensors of the host with a driver that knows an H100 and runs
nothing. This process may have Triton in interpreter mode, which is decided at import.
"""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CHILD = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from vllm_rsparse.kernels import rsparse_linear as launcher
from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.op.triton_backend import rsparse_linear
from vllm_rsparse.testing.cases import make_case

class Hopper:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

run = JITFunction.run

def compile_only(kernel, *args, **options):
    options["warmup"] = True
    made[kernel.__name__] = run(kernel, *args, **options).asm["ptx"]

driver.set_active(Hopper())
JITFunction.run = compile_only
launcher.has_dependent_launch = lambda device: True

for case in json.loads(sys.argv[1]):
    sizes, ranks = ((1024,), (0,))
    if case["factors"]:
        sizes, ranks = ((1024, 256, 512), (48, 0, 16))
    # 16 columns more: a last tile that is not full, rows that stay aligned.
    sizes = (*sizes[:-1], sizes[-1] + (0 if case["even"] else 16))
    launcher._extent = lambda matrix: 2**31 if case["wide"] else 1
    call = make_case(case["tokens"], 512, sizes, ranks, torch.bfloat16)
    made = {}
    rsparse_linear(*call.args(), LaunchConfig(**case["config"]))
    print(json.dumps(made), flush=True)
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
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(list(CASES.values()))],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    made = [json.loads(line) for line in done.stdout.splitlines()]
    failed = list(CASES)[len(made) : len(made) + 1]
    assert done.returncode == 0, f"{failed}: {done.stderr[-3000:]}"
    return dict(zip(CASES, made, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_compiles(launches: dict[str, dict[str, str]], name: str) -> None:
    # Nothing is split, and there are no factors: one launch writes the output.
    direct = name == "direct"
    expected = {"sums_kernel"} if direct else {"sums_kernel", "finish_kernel"}
    assert set(launches[name]) == expected
    if not CASES[name]["config"]["use_dot"]:
        assert re.search(WIDE_LOAD, launches[name]["sums_kernel"])
