# SPDX-License-Identifier: Apache-2.0
"""One token of int4, fp8-block and planes: a slot of the matrix units for each block.

Interpreted on a machine without CUDA; with CUDA the same tests run on the device.
"""

import pytest
import torch

pytest.importorskip("triton")

from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.kernels.stored_rows import codes_per_word
from vllm_rsparse.op.reference import rsparse_linear as reference
from vllm_rsparse.op.triton_backend import rsparse_linear
from vllm_rsparse.testing.cases import Case, make_case, relative_error, same_bits
from vllm_rsparse.testing.tolerances import tolerance

from .weights import store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Operands in half precision on a device; the interpreter multiplies in float32.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SCALED = ["int4-g64", "int4-asym-g32", "fp8-block", "int8-planes"]


def case_of(name: str, *args, **options) -> Case:
    return make_case(1, *args, dtype=DTYPE, device=DEVICE, store=store(name), **options)


def run(
    case: Case, words: int, warps: int, block_k: int, split_k: int, stages: int
) -> torch.Tensor:
    columns = warps * words * 8 * codes_per_word(case.operands.weight)
    return rsparse_linear(
        *case.args(),
        LaunchConfig(columns, block_k, split_k, warps, stages, False, packed=True),
    )


def check_shards(out: torch.Tensor, case: Case) -> None:
    """Per shard: one that is wrong must not hide behind the others."""
    sizes = list(case.operands.shard_sizes)
    pairs = zip(out.split(sizes, 1), case.exact().split(sizes, 1), strict=True)
    for got, expected in pairs:
        assert relative_error(got, expected) < tolerance(case.x.dtype)


@pytest.mark.parametrize("weight", SCALED)
@pytest.mark.parametrize(
    ("words", "warps", "stages"), [(1, 4, 1), (2, 2, 2), (4, 1, 4), (4, 4, 4)]
)
def test_warps_divide_the_columns(weight, words, warps, stages):
    # Tiles end before their last column, and warps lie past the end of a shard. A
    # scale of fp8-block never reaches over the end of one.
    sizes = [128, 256, 128 + 24] if weight == "fp8-block" else [40, 256, 128 + 24]
    case = case_of(weight, 384, sizes, [0, 16, 7])
    check_shards(run(case, words, warps, 128, 2, stages), case)


@pytest.mark.parametrize("weight", SCALED)
@pytest.mark.parametrize("block_k", [32, 128])
def test_more_blocks_than_slots_are_split(weight, block_k):
    case = case_of(weight, 1280, [64], [0])
    check_shards(run(case, 1, 1, block_k, 1, 4), case)


@pytest.mark.parametrize("weight", SCALED)
@pytest.mark.parametrize("kept", [0, 1, 3, 4, 17, 255, 256])
def test_steps_of_several_blocks(weight, kept):
    # Counts that are no multiple of a thread's four rows or of a step's sixteen.
    case = case_of(weight, 256, [128], [0])
    order = torch.randperm(256, generator=torch.Generator().manual_seed(kept))
    thresholds = case.operands.thresholds.fill_(float("inf"))
    thresholds[0, order[:kept]] = -1.0
    if weight == "int8-planes":
        thresholds[1, order[: kept // 2]] = -1.0
    check_shards(run(case, 2, 2, 64, 1, 2), case)


@pytest.mark.parametrize("weight", SCALED)
def test_what_is_dropped_leaves_no_trace(weight):
    case = case_of(weight, 256, [128], [0], constants=False)
    case.operands.thresholds[:, 3] = float("inf")
    expected = reference(case.x.float(), case.operands, None)
    case.x[0, 3] = float("inf")
    out = run(case, 2, 2, 64, 1, 2)
    assert relative_error(out, expected) < tolerance(case.x.dtype)
    case.x[0, 200] = float("nan")
    assert run(case, 2, 2, 64, 1, 2).isnan().all()


@pytest.mark.parametrize("weight", SCALED)
def test_same_bits_every_time(weight):
    case = case_of(weight, 512, [128, 128], [16, 0])
    first = run(case, 2, 2, 64, 3, 2)
    assert same_bits(run(case, 2, 2, 64, 3, 2), first)
