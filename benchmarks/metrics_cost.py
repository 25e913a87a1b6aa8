# SPDX-License-Identifier: Apache-2.0
"""What the metrics cost on a CPU: time spent counting, as a share of the linears' time.

    python benchmarks/metrics_cost.py --shape llama-1b

The linears of a whole model are called as a decode step calls them, with random weights
and half of the channels kept, while a clock runs around every call of the observer. A
real step does more than its linears, so the share printed is an upper bound. Means, not
medians: the sampled steps are few and the dear ones.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from vllm_rsparse import ops
from vllm_rsparse.metrics.counters import Counters, Settings
from vllm_rsparse.ops import resolve_backend

# Name -> layers, and (N of each shard, K) of the fused linears of a layer.
SHAPES = {
    "pyllama-8m": (
        4,
        [([384, 128, 128], 384), ([384], 384), ([1024, 1024], 384), ([384], 1024)],
    ),
    "llama-1b": (
        16,
        [
            ([2048, 512, 512], 2048),
            ([2048], 2048),
            ([8192, 8192], 2048),
            ([2048], 8192),
        ],
    ),
}
KINDS = (["q", "k", "v"], ["o"], ["gate", "up"], ["down"])


class Clock:
    """The observer with the time spent in it, in seconds."""

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self.seconds = 0.0

    def __call__(self, x: Tensor, thresholds: Tensor, dense: bool) -> None:
        start = time.perf_counter()
        self.counters.observe(x, thresholds, dense)
        self.seconds += time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--interval", type=int, default=250)
    args = parser.parse_args()
    layers, linears = SHAPES[args.shape]
    calls = []
    backend = int(resolve_backend("auto", "cpu"))
    with tempfile.TemporaryDirectory() as directory:
        clock = Clock(Counters(Settings(Path(directory), args.interval), rank=0))
        for _ in range(layers):
            for names, (sizes, k) in zip(KINDS, linears, strict=True):
                n = sum(sizes)
                weight = torch.randn(k, n, dtype=torch.bfloat16).t()
                thresholds = torch.full((len(sizes), k), 0.674)
                none = (
                    torch.empty(n, 0, dtype=torch.bfloat16),
                    torch.empty(0, k, dtype=torch.bfloat16),
                )
                ranks = [0] * len(sizes)
                clock.counters.register(names, thresholds, sizes, ranks, 2)
                x = torch.randn(1, k, dtype=torch.bfloat16)
                calls.append((x, weight, thresholds, *none, None, None, sizes, ranks))
        ops.set_observer(clock)
        for warm_up in (True, False):
            clock.seconds = 0.0
            start = time.perf_counter()
            for _ in range(args.interval if warm_up else args.steps):
                for call in calls:
                    ops.linear(*call, 1, backend)
            total = time.perf_counter() - start
    step_us, counting_us = (1e6 * t / args.steps for t in (total, clock.seconds))
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {args.shape},"
        f" {args.steps} steps, every {args.interval}th sampled: {step_us:.0f} us each,"
        f" {counting_us:.1f} us of it counting = {100 * counting_us / step_us:.3f}%"
    )


if __name__ == "__main__":
    main()
