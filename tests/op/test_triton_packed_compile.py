# SPDX-License-Identifier: Apache-2.0
"""The kernels for int4 and fp8 weights compile for Hopper to what they are meant to be.

The packed kernel's steps rename registers. Where a compiler lays tensors out otherwise,
results stay right and every word takes a detour: hence the counts.
"""

import re

import pytest

pytest.importorskip("triton")
import triton

from .hopper import compile_all

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
CALL = """
from vllm_rsparse.formats.checkpoints.parse import parse_scheme
from vllm_rsparse.formats.int8_planes import encode_planes
from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.kernels.scratch_linear import dequantise
from vllm_rsparse.kernels.stored_rows import codes_per_word
from vllm_rsparse.op import triton_backend
from vllm_rsparse.testing.cases import make_case
from vllm_rsparse.testing.quantized import LAYOUTS

def call(case):
    def store(weight):
        if case["weight"] == "int8-planes":
            return encode_planes(weight, 64, weight.dtype)
        config, quantise = LAYOUTS[case["weight"]]
        layout = parse_scheme(config, "config").layout("linear")
        return layout.store(quantise(weight.float())[0])

    sizes, ranks = (512,), (0,)
    if not case["even"]:
        sizes, ranks = (256, 128, 128 + 16), (48, 0, 8)
    dtype = getattr(torch, case["dtype"])
    made = make_case(case["tokens"], 512, sizes, ranks, dtype, store=store)
    weight, bias = made.operands.weight, made.bias
    columns = 32 * codes_per_word(weight)
    warps = case.get("warps", 1)
    if case.get("columns"):
        block_k = min(64, weight.group or 64)
        config = LaunchConfig(256, block_k, 2, 4, 3, False, packed=True)
        columns_linear.columns_linear(made.x, weight, bias, config)
        dequantise(weight, dtype)
        return
    packed = LaunchConfig(warps * columns, 64, 2, warps, 1, False, packed=True)
    if case["sparse"]:
        triton_backend.rsparse_linear(*made.args(), packed)
    else:
        triton_backend.dense_linear(made.x, weight, bias, packed)
        tiles = LaunchConfig(64, 32, 2, 4, 2, use_dot=True)
        triton_backend.dense_linear(made.x, weight, bias, tiles)
        dequantise(weight, dtype)
        x = made.x.expand(32, -1).contiguous()
        if wide_linear.takes_wide(x, weight):
            wide = LaunchConfig(128, 128, 2, 1, 4, False, packed=True)
            triton_backend.dense_linear(x, weight, bias, wide)
"""
WEIGHTS = (
    "w4a16-g128",
    "w4a16-asym-g32",
    "awq",
    "fp8-channel",
    "fp8-block",
    "int8-planes",
)
DENSE = [
    {"weight": weight, "dtype": dtype, "tokens": 1, "even": True, "sparse": False}
    for weight in WEIGHTS
    for dtype in ("bfloat16", "float16")
]
SPARSE = [
    {
        "weight": weight,
        "dtype": "bfloat16",
        "tokens": tokens,
        "even": even,
        "sparse": True,
    }
    for weight in WEIGHTS
    for tokens, even in ((1, True), (2, False), (8, False))
]
# One token, four warps of a program.
WARPS = [
    {
        "weight": weight,
        "dtype": "bfloat16",
        "tokens": 1,
        "even": True,
        "sparse": True,
        "warps": 4,
    }
    for weight in ("w4a16-g128", "awq", "fp8-block", "int8-planes")
]


FOUR_BIT = ("w4a16-asym-g32", "int8-planes")
# A warpgroup multiplies 64 tokens.
COLUMNS = [
    {
        "weight": weight,
        "dtype": "bfloat16",
        "tokens": 64,
        "even": True,
        "columns": True,
    }
    for weight in (*FOUR_BIT, "fp8-channel", "fp8-block")
]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, str]]:
    """PTX of every kernel by its name, by case."""
    cases = DENSE + SPARSE + WARPS + COLUMNS
    made = compile_all(CALL, cases)
    return {str(case): one for case, one in zip(cases, made, strict=True)}


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_words_become_operands_where_they_are(case, compiled):
    made = compiled[str(case)]
    packed = made["packed_kernel"]
    # 16 bytes a thread: the four channels of a step, before the loop and in it.
    loads = re.findall(r"ld\.global\.L1::evict_first\S*\.v4\.b32.*", packed)
    assert len(loads) == 8
    # One instruction for 16 columns and 8 slots; eight threads share four words each.
    columns = 128 if "fp8" in case["weight"] else 256
    assert packed.count("mma.sync.aligned.m16n8k16") == columns // 16
    # From the loads to the last product no word is passed on to another thread. Triton
    # 3.9 orders the threads of a load otherwise and passes every word on once, by
    # shuffles: right, and not measured.
    if TRITON < (3, 7):
        begin, end = packed.index(loads[0]), packed.rindex("mma.sync")
        assert not re.search(r"shfl\.sync|(st|ld)\.shared|matrix", packed[begin:end])
    assert "mma" in made["dense_kernel"]
    # Prompts keep NaN, by the conversion of the instruction set, which is slow.
    is_fp8 = "fp8" in case["weight"]
    assert "e4m3x2" not in made["dense_kernel"]
    if is_fp8 or case["dtype"] == "float16":
        assert ("e4m3x2" in made["dequantise_kernel"]) == is_fp8
    assert made["finish_dense_kernel"]


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_words_for_32_tokens_become_operands_where_they_are(case, compiled):
    made = compiled[str(case)]
    # int4 with scales of x's type, and fp8 with scales of columns.
    weight, dtype = case["weight"], case["dtype"]
    scales = {"w4a16": "bfloat16", "awq": "float16", "fp8-channel": dtype}
    takes = scales.get(weight.removesuffix("-g128").removesuffix("-asym-g32")) == dtype
    assert ("wide_kernel" in made) == takes
    if not takes:
        return
    wide = made["wide_kernel"]
    # Steps of 128 columns by 32 tokens: two where a group has 32 channels, else four.
    steps = 2 if "g32" in case["weight"] else 4
    assert wide.count("mma.sync.aligned.m16n8k16") == steps * 8 * 4
    if TRITON < (3, 7):
        begin, end = wide.index("ld.global.L1::evict_first"), wide.rindex("mma.sync")
        assert not re.search(r"shfl\.sync|(st|ld)\.shared|matrix", wide[begin:end])


@pytest.mark.parametrize("case", COLUMNS, ids=str)
def test_words_become_operands_of_a_warpgroup_where_they_are(case, compiled):
    made = compiled[str(case)]
    columns = made["columns_kernel"]
    # 64 columns of 16 channels an instruction; the registers come first.
    products = re.findall(
        r"wgmma\.mma_async\.\S*f32\.bf16\.bf16 \{[^}]*\}, \{", columns
    )
    words, codes = (1, 8) if case["weight"] in FOUR_BIT else (2, 4)
    channels = 32 if "g32" in case["weight"] else 64
    assert len(products) == words * codes // 2 * channels // 16
    if TRITON < (3, 7):
        assert "shfl.sync" not in columns
    if case["weight"] in FOUR_BIT and case["dtype"] == "bfloat16":
        # Sixteen bytes a thread.
        assert "st.global.v4.b32" in made["dequantise_pairs_kernel"]


@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_sparse_compiles(case, compiled):
    integers = case["tokens"] <= 2 and "fp8" not in case["weight"]
    product = "m16n8k32.row.col.satfinite.s32.s8.s8.s32" if integers else "m16n8k16"
    assert f"mma.sync.aligned.{product}" in compiled[str(case)]["packed_kernel"]


@pytest.mark.parametrize("case", WARPS, ids=str)
def test_warps_pass_nothing_on_in_the_loop(case, compiled):
    packed = compiled[str(case)]["packed_kernel"]
    loads = re.findall(r"ld\.global\.L1::evict_first\S*\.v4\.b32.*", packed)
    # A thread's rows of a step, before the loop and in it: of integers, twice as many.
    assert len(loads) == (8 if "fp8" in case["weight"] else 16)
    if TRITON < (3, 7):
        begin, end = packed.index(loads[0]), packed.rindex("mma.sync")
        assert not re.search(r"shfl\.sync|(st|ld)\.shared|bar\.sync", packed[begin:end])
