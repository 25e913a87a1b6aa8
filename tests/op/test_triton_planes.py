# SPDX-License-Identifier: Apache-2.0
"""Weights in two planes through the Triton backend: which rows are read of each.

Interpreted on a machine without CUDA; with CUDA the same tests run on the device.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from vllm_rsparse.formats.int8_planes import encode_planes
from vllm_rsparse.kernels import packed_linear
from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.op.reference import dense_linear as dense_reference
from vllm_rsparse.op.triton_backend import dense_linear, rsparse_linear
from vllm_rsparse.testing.cases import Case, make_case, relative_error, same_bits
from vllm_rsparse.testing.tolerances import tolerance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies in float32.
DTYPES = [torch.bfloat16, torch.float16] if DEVICE == "cuda" else [torch.float32]
SIZES = [64, 24]
INFINITY = float("inf")


def planes_case(
    tokens: int = 1,
    k: int = 256,
    group: int = 64,
    *,
    symmetric: bool = False,
    dtype: torch.dtype = DTYPES[0],
) -> Case:
    """Two shards; the thresholds are [plane 1: both shards; plane 2: both shards]."""
    store = partial(encode_planes, group=group, dtype=dtype, symmetric=symmetric)
    return make_case(tokens, k, SIZES, [0, 0], dtype, device=DEVICE, store=store)


def run(case: Case, block_k: int = 64, split_k: int = 2, stages: int = 2) -> Tensor:
    config = LaunchConfig(128, block_k, split_k, 1, stages, False, packed=True)
    return rsparse_linear(*case.args(), config)


def check(case: Case, **options: int) -> None:
    """Per shard and token: one that is wrong must not hide behind the others."""
    out, exact = run(case, **options), case.exact()
    for token in range(case.x.shape[0]):
        pairs = zip(out[token].split(SIZES), exact[token].split(SIZES), strict=True)
        for got, expected in pairs:
            assert relative_error(got, expected) < tolerance(case.x.dtype)


def keep(k: int, count: int, seed: int) -> Tensor:
    """Thresholds [K] that keep this many random channels."""
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    thresholds = torch.full((k,), INFINITY)
    thresholds[order[:count]] = -1.0
    return thresholds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("first", "second", "tokens", "symmetric"),
    [
        (256, 256, 1, False),
        (256, 0, 2, False),
        (0, 0, 1, False),
        (128, 128, 3, True),
        # Channels of the second plane that the first one drops: not calibrated so, but
        # what the definition says.
        (0, 256, 1, False),
        (100, 60, 1, True),
        (100, 60, 5, False),
        (17, 1, 8, True),
        (17, 1, 8, False),
    ],
)
def test_what_is_kept_of_each_plane(first, second, tokens, dtype, symmetric):
    case = planes_case(tokens, symmetric=symmetric, dtype=dtype)
    rows = [keep(256, count, seed) for seed, count in enumerate([first, 77, second, 9])]
    if first == second:
        rows[2] = rows[0]
    case.operands.thresholds.copy_(torch.stack(rows))
    check(case)


@pytest.mark.parametrize(
    ("k", "group", "block_k", "split_k", "stages"),
    [(96, 32, 128, 3, 4), (192, 64, 32, 2, 1), (384, 128, 64, 4, 4)],
)
def test_groups_and_blocks(k, group, block_k, split_k, stages):
    case = planes_case(2, k, group)
    check(case, block_k=block_k, split_k=split_k, stages=stages)


def test_ties_are_dropped_by_each_plane():
    case = planes_case(2)
    case.x.fill_(1.0)
    case.operands.thresholds[:2] = 0.5
    case.operands.thresholds[2:] = 1.0
    first = run(case)
    case.operands.thresholds[2:] = INFINITY
    assert same_bits(run(case), first)
    check(case)


def test_unwanted_infinity_leaves_no_trace():
    case = planes_case(2)
    case.operands.thresholds[:, 3] = INFINITY
    # Kept for the other token only.
    case.operands.thresholds[:, 200] = 2.0
    case.x[:, 200] = torch.tensor([1.0, 4.0])
    expected = case.exact()
    case.x[:, 3] = torch.tensor([INFINITY, -INFINITY])
    assert relative_error(run(case), expected) < tolerance(case.x.dtype)


def test_nan_is_kept_by_both_planes():
    case = planes_case(2)
    case.operands.thresholds.fill_(INFINITY)
    case.x[0, 200] = float("nan")
    out = run(case)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_scales_of_a_group_that_no_plane_keeps_are_not_used():
    case = planes_case(3)
    case.operands.thresholds[:, 64:128] = INFINITY
    expected = case.exact()
    case.operands.weight.scales[1] = float("nan")
    assert relative_error(run(case), expected) < tolerance(case.x.dtype)


def test_a_program_lists_the_rows_of_both_planes(monkeypatch):
    case = planes_case(2, 512)
    case.operands.thresholds.fill_(-1.0)
    launches = []
    launch = packed_linear.launch

    def recorded(kernel, device, grid, *arguments, **options):
        launches.append(grid)
        launch(kernel, device, grid, *arguments, **options)

    monkeypatch.setattr(packed_linear, "launch", recorded)
    monkeypatch.setattr(packed_linear, "MOST_LISTED", 256)
    check(case, split_k=1)
    # Twice 512 rows in lists of 256, whatever the configuration says.
    assert launches == [(1, 2, 4)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "block_k", "symmetric"),
    [(1, 128, False), (3, 32, True), (7, 64, False), (7, 32, True)],
)
def test_dense(tokens, block_k, dtype, symmetric):
    case = planes_case(tokens, 384, symmetric=symmetric, dtype=dtype)
    config = LaunchConfig(64, block_k, 2, 1, 4, False, packed=True)
    out = dense_linear(case.x, case.operands.weight, case.bias, config)
    exact = dense_reference(case.x.float(), case.operands.weight, case.bias.float())
    assert relative_error(out, exact) < tolerance(dtype)
