# SPDX-License-Identifier: Apache-2.0
"""One token of int4, fp8-block and planes, and two of the four-bit ones.

A slot of the matrix units takes a block of one token's channels.

Interpreted on a machine without CUDA; with CUDA the same tests run on the device.
"""

import pytest
import torch

pytest.importorskip("triton")

from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.kernels.stored_rows import codes_per_word
from vllm_rsparse.op.reference import rsparse_linear as reference
from vllm_rsparse.op.triton_backend import rsparse_linear
from vllm_rsparse.testing.cases import Case, make_case, relative_error, same_bits
from vllm_rsparse.testing.tolerances import tolerance

from .weights import store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FOUR_BIT = ["int4-g64", "int4-asym-g32", "int8-planes"]
SCALED = [*FOUR_BIT, "fp8-block"]
# Triton's interpreter truncates to bfloat16.
ROUNDINGS = 1 if DEVICE == "cuda" else 2
TOKENS_OF = [(name, 1) for name in SCALED] + [(name, 2) for name in FOUR_BIT]
SINGLE = LaunchConfig(128, 64, 1, 2, 2, False, packed=True)


def case_of(
    name: str, *args, tokens: int = 1, dtype: torch.dtype | None = None, **options
) -> Case:
    # Four-bit codes meet x in integers where x is in half precision. Of fp8-block, the
    # interpreter multiplies in float32.
    if dtype is None:
        exact = DEVICE == "cpu" and name == "fp8-block"
        dtype = torch.float32 if exact else torch.bfloat16
    options |= {"dtype": dtype, "device": DEVICE, "store": store(name)}
    return make_case(tokens, *args, **options)


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
        assert relative_error(got, expected) < tolerance(case.x.dtype, ROUNDINGS)


@pytest.mark.parametrize(("weight", "tokens"), TOKENS_OF)
@pytest.mark.parametrize(
    ("words", "warps", "stages"), [(1, 4, 1), (2, 2, 2), (4, 1, 4), (4, 4, 4)]
)
def test_warps_divide_the_columns(weight, tokens, words, warps, stages):
    # Tiles end before their last column, and warps lie past the end of a shard. A
    # scale of fp8-block never reaches over the end of one.
    sizes = [128, 256, 128 + 24] if weight == "fp8-block" else [40, 256, 128 + 24]
    case = case_of(weight, 384, sizes, [0, 16, 7], tokens=tokens)
    check_shards(run(case, words, warps, 128, 2, stages), case)


@pytest.mark.parametrize(("weight", "tokens"), TOKENS_OF)
@pytest.mark.parametrize("block_k", [32, 128])
def test_more_blocks_than_slots_are_split(weight, tokens, block_k):
    case = case_of(weight, 1280, [64], [0], tokens=tokens)
    check_shards(run(case, 1, 1, block_k, 1, 4), case)


@pytest.mark.parametrize(("weight", "tokens"), TOKENS_OF)
@pytest.mark.parametrize("kept", [0, 1, 3, 4, 17, 255, 256])
def test_steps_of_several_blocks(weight, tokens, kept):
    # Counts that are no multiple of a thread's four rows or of a step's sixteen.
    case = case_of(weight, 256, [128], [0], tokens=tokens)
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
    assert relative_error(out, expected) < tolerance(case.x.dtype, ROUNDINGS)
    case.x[0, 200] = float("nan")
    assert run(case, 2, 2, 64, 1, 2).isnan().all()


@pytest.mark.parametrize("weight", FOUR_BIT)
def test_tokens_have_masks_and_units_of_their_own(weight):
    case = case_of(weight, 256, [128], [0], tokens=2, constants=False)
    thresholds = case.operands.thresholds.fill_(0.5)
    # One token keeps nothing of the second block of channels, and next to the other's
    # the x of this token are tiny.
    case.x[0, 64:128] = 0.25
    case.x[1] *= 1e-4
    case.operands.thresholds[:, ::3] = -1.0
    thresholds[:, 64:128] = 0.5
    out = run(case, 2, 2, 64, 2, 2)
    exact = reference(case.x.float(), case.operands, None)
    for got, expected in zip(out, exact, strict=True):
        assert relative_error(got, expected) < tolerance(case.x.dtype, ROUNDINGS)
    # Alone, a token gets the same bits: what the other keeps is zero for it.
    for token in range(2):
        alone = case_of(weight, 256, [128], [0], constants=False)
        alone.x.copy_(case.x[token : token + 1])
        alone.operands.thresholds.copy_(thresholds)
        assert same_bits(run(alone, 2, 2, 64, 2, 2)[0], out[token])


@pytest.mark.parametrize("weight", FOUR_BIT)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float16, scale) for scale in (0.0, 1e-7, 1.0, 5e3)]
    + [(torch.bfloat16, scale) for scale in (0.0, 1e-38, 1.0, 1e30)],
)
def test_x_of_any_size(weight, dtype, scale):
    case = case_of(weight, 256, [128], [0], dtype=dtype, constants=False)
    case.operands.thresholds.fill_(-1.0)
    case.x.mul_(scale)
    out = rsparse_linear(*case.args(), SINGLE).float()
    exact = reference(case.x.float(), case.operands, None)
    # Half of the smallest float16 for results that are not normal numbers.
    smallest = 2.0**-24 if dtype == torch.float16 else 0.0
    bound = tolerance(dtype, ROUNDINGS) * exact.norm() + smallest * exact.numel() ** 0.5
    assert (out - exact).norm() <= bound


@pytest.mark.parametrize("weight", FOUR_BIT)
def test_one_large_x_costs_the_others_little(weight):
    # A "massive activation": the others of its block are counted in its units.
    case = case_of(weight, 256, [128], [0], constants=False)
    case.operands.thresholds.fill_(-1.0)
    case.x[0, 5] = 1000 * case.x.abs().max()
    with_it = rsparse_linear(*case.args(), SINGLE).float()
    exact = reference(case.x.float(), case.operands, None)
    assert relative_error(with_it, exact) < tolerance(case.x.dtype, ROUNDINGS)
    # Where the weights of the large one are zero, the others show what they lost: each
    # x up to half a unit, in planes once more times half the codes of the second.
    silence(case.operands.weight, 5)
    out = rsparse_linear(*case.args(), SINGLE).float()
    exact = reference(case.x.float(), case.operands, None)
    block = case.operands.weight.group
    reach = case.operands.weight.dequantise()[:, :block].abs().sum(1)
    if weight == "int8-planes":
        reach += 8 * block * case.operands.weight.scales[0].float()
    half_unit = 2.0**-14 * case.x[0, 5].abs().float()
    bound = half_unit * reach + torch.finfo(case.x.dtype).eps * exact.abs()
    assert ((out - exact).abs() <= bound).all()


def silence(weight: StoredWeight, channel: int) -> None:
    """Make a channel's weights zero, by the codes of its zero points."""
    middle = torch.tensor(-0x77777778, dtype=torch.int32)
    planes = weight.data.view(-1, weight.k, weight.n // 8)
    zeros = weight.zeros
    planes[0, channel] = middle if zeros is None else zeros[channel // weight.group]
    planes[1:, channel] = middle


@pytest.mark.parametrize("weight", FOUR_BIT)
@pytest.mark.parametrize("found", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_shows(weight, found):
    case = case_of(weight, 256, [128], [0])
    case.x[0, 200] = found
    assert not rsparse_linear(*case.args(), SINGLE).isfinite().any()


@pytest.mark.parametrize("weight", FOUR_BIT)
@pytest.mark.parametrize("found", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_with_its_token(weight, found):
    case = case_of(weight, 256, [128], [0], tokens=2)
    case.x[1, 200] = found
    out = rsparse_linear(*case.args(), SINGLE)
    assert not out[1].isfinite().any()
    exact = case.exact()[0]
    assert relative_error(out[0], exact) < tolerance(case.x.dtype, ROUNDINGS)


@pytest.mark.parametrize(("weight", "tokens"), TOKENS_OF)
def test_same_bits_every_time(weight, tokens):
    case = case_of(weight, 512, [128, 128], [16, 0], tokens=tokens)
    first = run(case, 2, 2, 64, 3, 2)
    assert same_bits(run(case, 2, 2, 64, 3, 2), first)


@pytest.mark.parametrize("columns", [128, 2048])
def test_columns_that_no_thread_could_take(columns):
    case = case_of("int4-g64", 128, [64], [0])
    config = LaunchConfig(columns, 64, 1, 4, 2, False, packed=True)
    with pytest.raises(ValueError, match=f"block_n is {columns} and num_warps 4"):
        rsparse_linear(*case.args(), config)
