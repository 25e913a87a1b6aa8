# SPDX-License-Identifier: Apache-2.0
"""How the backend ``cpu-torch`` cuts columns into chunks."""

import math

import pytest

from vllm_rsparse.op.cpu_torch import _MAX_CHUNK, _MIN_CHUNK, _chunk_width


@pytest.mark.parametrize(
    "sizes",
    [(8192, 8192), (2048, 512, 512), (14336, 14336), (7919,), (33,), (5, 10), (1, 1)],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_chunks_are_the_widest_that_balance(sizes, threads):
    """The promises of ``_chunk_width``, against a search over every divisor."""
    width = _chunk_width(sizes, threads)
    assert all(size % width == 0 for size in sizes)
    common = math.gcd(*sizes)
    good = [
        w
        for w in range(1, common + 1)
        if common % w == 0 and min(_MIN_CHUNK, common) <= w <= _MAX_CHUNK
    ]
    if not good:  # 7919 is prime: a shard is one chunk
        assert width == common
        return
    assert min(_MIN_CHUNK, common) <= width <= _MAX_CHUNK
    chunks = {w: sum(sizes) // w for w in good}
    busy = [w for w in good if chunks[w] >= threads]
    even = [w for w in good if chunks[w] % threads == 0]
    if even:
        assert width == max(even)
    elif busy:
        assert width == max(busy)
    else:
        assert width == min(good)


def test_chunks_of_a_known_layer():
    # gate_up of 2048 x 16384: four chunks of 4096 columns, two a thread.
    assert _chunk_width((8192, 8192), 2) == 4096
    # Three threads: no count of chunks divides by 3, and more, never fewer, are taken.
    assert 16384 // _chunk_width((8192, 8192), 3) == 4
    assert _chunk_width((2048, 512, 512), 2) == 512
