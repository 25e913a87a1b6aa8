# SPDX-License-Identifier: Apache-2.0
"""Time of a call, inside a CUDA graph on a GPU."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median and 20th and 80th percentile over replays."""

    median: float
    p20: float
    p80: float


def time_calls(
    calls: Sequence[Callable[[], object]], calls_per_graph: int = 120, replays: int = 15
) -> Timing:
    """Time consecutive calls, on a GPU replayed from one graph.

    Args:
        calls: one per set of rotating inputs; the graph cycles through them.
        calls_per_graph: enough to make the start of a replay (about 10 us) negligible.
        replays: timed replays, after two warm-up replays.
    """
    if not torch.cuda.is_available():
        return time_rounds([calls], replays)[0]
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
    return _quantiles([a.elapsed_time(b) * 1e3 / count for a, b in events[2:]])


def time_rounds(
    groups: Sequence[Sequence[Callable[[], object]]], rounds: int = 15
) -> list[Timing]:
    """Time groups of calls on the CPU in turns, so that all meet the same disturbance.

    Args:
        groups: what to compare; each is timed as a whole, per call.
        rounds: timed rounds over all groups, after one warm-up round.
    """
    times: list[list[float]] = [[] for _ in groups]
    for _ in range(rounds + 1):
        for group, taken in zip(groups, times, strict=True):
            start = time.perf_counter()
            for call in group:
                call()
            taken.append((time.perf_counter() - start) * 1e6 / len(group))
    return [_quantiles(taken[1:]) for taken in times]


def _quantiles(times: list[float]) -> Timing:
    quantiles = torch.tensor(times).quantile(torch.tensor([0.5, 0.2, 0.8]))
    return Timing(*quantiles.tolist())
