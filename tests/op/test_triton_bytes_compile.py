# SPDX-License-Identifier: Apache-2.0
"""The kernel for int8-planes times x in bytes compiles for Hopper to what it should be.

As ``test_triton_packed_compile.py``: where a compiler lays tensors out otherwise,
results stay right and every word takes a detour.
"""

import re

import pytest

pytest.importorskip("triton")
import triton

from .hopper import compile_all

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
CALL = """
from vllm_rsparse.formats.int8_planes import encode_planes
from vllm_rsparse.kernels.launch_config import LaunchConfig, Rounding

def call(case):
    group, warps = case["group"], case["warps"]
    weight = encode_planes(torch.randn(512, 512), group, torch.bfloat16)
    x = torch.zeros(case["tokens"], 512, dtype=torch.bfloat16)
    config = LaunchConfig(case["columns"], 128, 2, warps, 3, False, packed=True)
    rounding = Rounding(128, case["digits"])
    byte_linear.byte_linear(x, weight, None, config, rounding)
"""
CASES = [
    {"tokens": tokens, "group": group, "columns": columns, "warps": warps, "digits": d}
    for tokens, group, columns, warps, d in (
        (16, 128, 128, 4, 2),
        (32, 128, 128, 4, 2),
        (32, 64, 256, 8, 2),
        (16, 128, 256, 4, 1),
        (64, 32, 128, 4, 1),
    )
]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, str]]:
    """PTX of every kernel by its name, by case."""
    made = compile_all(CALL, CASES)
    return {str(case): one for case, one in zip(CASES, made, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_become_operands_where_they_are(case, compiled):
    made = compiled[str(case)]
    product = made["byte_columns_kernel"]
    columns = max(16, case["tokens"] * case["digits"])
    # An instruction has 64 columns of the weight and 32 channels; registers come first.
    found = re.findall(
        rf"wgmma\.mma_async\.sync\.aligned\.m64n{columns}k32\.s32\.s8\.s8 "
        r"\{[^}}]*\}, \{",
        product,
    )
    tiles = case["columns"] // (16 * case["warps"])
    assert len(found) == tiles * case["group"] // 32
    assert "st.global" in made["_round_blocks_kernel"]
    assert "shfl.sync" not in product
    if TRITON < (3, 7):
        # Halves of words, four 8 by 8 matrices an instruction, of both planes.
        matrices = re.findall(r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans", product)
        assert len(matrices) == tiles // 2 * case["group"] // 32 * 2
