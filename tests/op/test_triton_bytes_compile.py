# SPDX-License-Identifier: Apache-2.0
"""The kernels that multiply bytes compile for Hopper to what they should be.

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
from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.fp8 import FP8
from vllm_rsparse.formats.int8_planes import encode_planes
from vllm_rsparse.kernels.launch_config import LaunchConfig, Rounding

def call(case):
    if "group" not in case:
        data = torch.zeros(512, 512).to(torch.float8_e4m3fn)
        weight = StoredWeight(FP8, data.t(), 512, 512, torch.ones(512))
        x = torch.zeros(case["tokens"], 512).to(torch.float8_e4m3fn)
        config = LaunchConfig(case["columns"], 128, 2, 4, 3, False, packed=True)
        scales = torch.ones(len(x), 1)
        rounded_linear.rounded_linear(x, scales, weight, None, config)
        return
    group, warps = case["group"], case["warps"]
    weight = encode_planes(torch.randn(512, 512), group, torch.bfloat16)
    x = torch.zeros(case["tokens"], 512, dtype=torch.bfloat16)
    config = LaunchConfig(case["columns"], 128, 2, warps, 3, False, packed=True)
    rounding = Rounding(128 if case["digits"] == 2 else 64, case["digits"])
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
FP8 = [{"tokens": tokens, "columns": 128} for tokens in (16, 128)]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, str]]:
    """PTX of every kernel by its name, by case."""
    cases = CASES + FP8
    made = compile_all(CALL, cases)
    return {str(case): one for case, one in zip(cases, made, strict=True)}


def count_products(ptx: str, kind: str) -> int:
    """Instructions of 64 columns by 32 channels whose first operand is registers."""
    instruction = rf"wgmma\.mma_async\.sync\.aligned\.{kind} \{{[^}}]*\}}, \{{"
    return len(re.findall(instruction, ptx))


def count_matrices(ptx: str) -> int:
    """Loads of halves of words, four 8 by 8 matrices an instruction."""
    return len(re.findall(r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans", ptx))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_become_operands_where_they_are(case, compiled):
    made = compiled[str(case)]
    product = made["byte_columns_kernel"]
    columns = max(16, case["tokens"] * case["digits"])
    tiles = case["columns"] // (16 * case["warps"])
    steps = case["group"] // 32
    found = count_products(product, rf"m64n{columns}k32\.s32\.s8\.s8")
    assert found == tiles * steps
    assert "st.global" in made["_round_blocks_kernel"]
    assert "shfl.sync" not in product
    if TRITON < (3, 7):
        # Of both planes, whose halves are columns of two tiles.
        assert count_matrices(product) == tiles // 2 * steps * 2


@pytest.mark.parametrize("case", FP8, ids=str)
def test_fp8_becomes_operands_where_it_is(case, compiled):
    product = compiled[str(case)]["rounded_columns_kernel"]
    tiles, steps = case["columns"] // 64, 4
    found = count_products(product, rf"m64n{case['tokens']}k32\.f32\.e4m3\.e4m3")
    assert found == tiles * steps
    assert "shfl.sync" not in product
    if TRITON < (3, 7):
        assert count_matrices(product) == tiles * steps
