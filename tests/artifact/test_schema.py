# SPDX-License-Identifier: Apache-2.0
"""The figures of ``rsparse.json``, and the values that no linear can have."""

from dataclasses import replace

import pytest

from vllm_rsparse.artifact.schema import (
    BaseWeights,
    LinearEntry,
    bits_read,
    factor_rank,
    model_sparsity,
)

# Groups of 64: 4 bits and 20 / 64 of scales and zero points in the first plane.
PLANES = LinearEntry((16, 64), 0.5, 1.0, 0, kept_fraction=0.5, full_fraction=0.25)
FIRST, SECOND = 4 + 20 / 64, 4


def test_model_sparsity_counts_factors():
    entry = LinearEntry((8, 4), 0.5, 0.95, rank=1, kept_fraction=0.25)
    other = LinearEntry((4, 4), 0.5, 1.0, rank=0, kept_fraction=0.5)
    # 0.25 * 32 kept + 1 * (8 + 4) factors, 0.5 * 16 kept; of 32 + 16.
    assert model_sparsity({"a": entry, "b": other}) == pytest.approx(1 - 28 / 48)


@pytest.mark.parametrize(
    ("n", "k", "rank"),
    # Llama-3-8B at s 0.5, rho 0.95: q and o, k and v under grouped queries, gate, down.
    [(4096, 4096, 51), (1024, 4096, 20), (14336, 4096, 79), (4096, 14336, 79)],
)
def test_rank_spends_the_budget_of_the_true_shape(n, k, rank):
    assert factor_rank(n, k, 0.5, 0.95) == rank
    assert factor_rank(n, k, 0.5, 1.0) == 0


def test_planes_count_by_what_each_keeps():
    read = 0.5 * FIRST + 0.25 * SECOND
    assert PLANES.read_fraction == pytest.approx(read / (FIRST + SECOND))
    assert PLANES.read_elements == pytest.approx(16 * 64 * read / (FIRST + SECOND))
    assert bits_read({"a": PLANES}) == pytest.approx(read)
    # Weighted by elements; groups of 32 have more scales.
    other = LinearEntry((16, 32), 0.5, 1.0, 0, kept_fraction=1.0, full_fraction=1.0)
    mean = (2 * read + (4 + 20 / 32) + 4) / 3
    assert bits_read({"a": PLANES, "b": other}) == pytest.approx(mean)
    assert bits_read({"a": PLANES, "b": replace(other, full_fraction=None)}) is None


def test_fractions_that_were_counted_elsewhere():
    counted = PLANES.counted([0.75, 0.5])
    assert (counted.kept_fraction, counted.full_fraction) == (0.75, 0.5)
    plain = replace(PLANES, full_fraction=None).counted([0.75])
    assert (plain.kept_fraction, plain.full_fraction) == (0.75, None)
    assert plain.read_fraction == 0.75


def test_defaults_of_the_base():
    assert BaseWeights("float", "bfloat16") == BaseWeights(
        "float", "bfloat16", 0, False
    )


@pytest.mark.parametrize("shape", [(1, 1), (1 << 24, 1), (1, 1 << 24)])
def test_sizes_that_are_possible(shape):
    assert LinearEntry(shape, 0.5, 1.0, 0, 0.5).shape == shape
    assert LinearEntry(shape, 0.5, 1.0, 1, 0.5).rank == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (0, 64)}, r"shape must be two positive .* up to 16777216, got \[0,"),
        ({"shape": (16, (1 << 24) + 1)}, "shape must be two positive integers"),
        ({"rank": 17}, r"rank must lie in \[0, 16\], got 17"),
        ({"rank": -1}, r"rank must lie in \[0, 16\], got -1"),
        (
            {"full_fraction": 0.51},
            "full_fraction is 0.51, more than kept_fraction",
        ),
        (
            {"shape": (16, 65)},
            "full_fraction is for weights in two planes, and 65 ",
        ),
    ],
)
def test_values_that_no_linear_can_have(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(PLANES, **changes)


def test_all_kept_channels_may_be_read_with_both_planes():
    assert replace(PLANES, full_fraction=0.5).full_fraction == 0.5
