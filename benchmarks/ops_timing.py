# SPDX-License-Identifier: Apache-2.0
"""Time of a call inside a CUDA graph, and the read bandwidth of the device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median and the 20th and 80th percentile over replays."""

    median: float
    p20: float
    p80: float


def time_calls(
    calls: list[Callable[[], object]], calls_per_graph: int = 120, replays: int = 15
) -> Timing:
    """Time calls replayed one after another from one graph.

    Args:
        calls: one for each set of rotating inputs; the graph cycles through them.
        calls_per_graph: enough that starting the replay (about 10 us) does not count.
        replays: timed replays, after two that are not.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    count = -(-calls_per_graph // len(calls)) * len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(count):
            calls[index % len(calls)]()
    events = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for _ in range(replays + 2)
    ]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = torch.tensor([a.elapsed_time(b) * 1e3 / count for a, b in events[2:]])
    quantiles = times.quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()
    return Timing(*quantiles)


@triton.jit
def _read_kernel(source_ptr, sum_ptr, BLOCK: tl.constexpr, LOOPS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    offsets = program * BLOCK * LOOPS + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in tl.static_range(LOOPS):
        total += tl.load(source_ptr + offsets, eviction_policy="evict_first")
        offsets += BLOCK
    tl.store(sum_ptr + program, tl.sum(total, axis=0))


def read_bandwidth() -> float:
    """Bytes a second of a kernel that only reads: 8 GiB once through."""
    block, loops = 4096, 8
    source = torch.ones(2**31, dtype=torch.float32, device="cuda")
    programs = source.numel() // (block * loops)
    sums = torch.empty(programs, device="cuda")

    def read() -> None:
        _read_kernel[(programs,)](source, sums, block, loops, num_warps=8)

    timing = time_calls([read], calls_per_graph=1, replays=10)
    if sums.sum().item() != source.numel():
        raise RuntimeError("the read kernel did not read every element")
    return source.numel() * 4 / (timing.median * 1e-6)
