# SPDX-License-Identifier: Apache-2.0
"""What the metrics cost: time spent counting, as a share of the linears' time.

    python benchmarks/metrics_cost.py --shape llama-1b                     (CPU)
    python benchmarks/metrics_cost.py --shape llama-3-8b --device cuda

Calls the linears of a whole model as a decode step does, with random weights and half
of the channels kept. A real step does more than its linears, so the printed share is an
upper bound. On a CPU every call of the observer is timed and the mean is reported, not
the median, because the sampled steps are few and expensive. On a GPU the calls are
captured twice, with and without counting, and the two graphs are replayed alternately:
medians, and the spread of the difference. The counts must be right at the end.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from random_model import SHAPES
from torch import Tensor

from vllm_rsparse.artifact.tensors import LinearTensors
from vllm_rsparse.formats.plain import store_float
from vllm_rsparse.metrics import layout
from vllm_rsparse.metrics.counters import Counters, Settings
from vllm_rsparse.metrics.directory import CountsDirectory
from vllm_rsparse.op import layers, observers, ops
from vllm_rsparse.op.backends import resolve_backend
from vllm_rsparse.op.operands import SparseOperands

# The linears of a decoder layer that vLLM fuses into one.
FUSED = (
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
)


class Clock:
    """The observer with the time spent in it, in seconds."""

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self.seconds = 0.0

    def __call__(
        self, layer: int, x: Tensor, operands: SparseOperands, dense: bool
    ) -> None:
        start = time.perf_counter()
        self.counters.observe(layer, x, operands, dense)
        self.seconds += time.perf_counter() - start


def make_calls(shape: str, device: str, counters: Counters) -> list[tuple[Any, ...]]:
    """Arguments of the op for every linear of the model, each layer registered."""
    linears = SHAPES[shape].linears
    calls: list[tuple[Any, ...]] = []
    for _ in range(SHAPES[shape].layers):
        for names in FUSED:
            sizes, k = [linears[name][0] for name in names], linears[names[0]][1]
            weight = torch.randn(k, sum(sizes), dtype=torch.bfloat16, device=device)
            tensors = LinearTensors(torch.full((k,), 0.674), None, None, None)
            operands = SparseOperands.from_shards(
                store_float(weight.t()), [tensors] * len(sizes), sizes, weight.dtype
            )
            layer = layers.next_layer()
            layers.set_layer(operands.thresholds, layer)
            counters.register(layer, names, operands)
            x = torch.randn(1, k, dtype=torch.bfloat16, device=device)
            calls.append((x, *operands.schema_args()))
    return calls


def measure_cpu(
    calls: list[tuple[Any, ...]], counters: Counters, args: argparse.Namespace
) -> tuple[str, int]:
    """The result in words, and the steps that must have been counted."""
    backend = int(resolve_backend("auto", "cpu"))
    clock = Clock(counters)
    observers.add_observer(clock)
    for warm_up in (True, False):
        clock.seconds = 0.0
        start = time.perf_counter()
        for _ in range(args.interval if warm_up else args.steps):
            for call in calls:
                ops.linear(*call, 1, backend)
        total = time.perf_counter() - start
    step_us, counting_us = (1e6 * t / args.steps for t in (total, clock.seconds))
    text = (
        f"{torch.get_num_threads()} threads, {args.steps} steps, every"
        f" {args.interval}th sampled: {step_us:.0f} us each, of which"
        f" {counting_us:.1f} us for counting = {100 * counting_us / step_us:.3f}%"
    )
    return text, args.interval + args.steps


def measure_cuda(
    calls: list[tuple[Any, ...]], counters: Counters, args: argparse.Namespace
) -> tuple[str, int]:
    """The result in words, and the steps that must have been counted."""
    backend = int(resolve_backend("triton", "cuda"))

    def step() -> None:
        for call in calls:
            ops.linear(*call, 1, backend)

    graphs = []
    observers.add_observer(counters.observe)
    for counted in (True, False):
        if not counted:
            observers.remove_observer(counters.observe)
        step()  # compile, map
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            step()
    rounds, replays = 21, max(1, args.steps // 21)
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for graph, found in zip(graphs, times, strict=True):
            graph.replay()  # the same state before each timing
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(replays):
                graph.replay()
            last.record()
            torch.cuda.synchronize()
            found.append(1e3 * first.elapsed_time(last) / replays)
    differences = sorted(a - b for a, b in zip(*times, strict=True))
    plain = statistics.median(times[1])
    extra = statistics.median(differences)
    text = (
        f"{torch.cuda.get_device_name()}, {rounds} rounds of {replays} replays:"
        f" {plain:.1f} us per step, counting adds {extra:.2f} us"
        f" ({differences[0]:.2f} to {differences[-1]:.2f}) = {100 * extra / plain:.3f}%"
    )
    return text, 1 + rounds * (1 + replays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--interval", type=int, default=250)
    args = parser.parse_args()
    directory = CountsDirectory()
    counters = Counters(Settings(directory.path, args.interval), rank=0)
    calls = make_calls(args.shape, args.device, counters)
    measure = {"cpu": measure_cpu, "cuda": measure_cuda}[args.device]
    result, steps = measure(calls, counters, args)
    ((_, slots),) = layout.read_ranks(directory.path)
    if slots[layout.step_slot(0, 1)] != steps:
        raise SystemExit(f"counted {slots[layout.step_slot(0, 1)]} steps of {steps}")
    print(f"torch {torch.__version__}, {args.shape}, {result}")


if __name__ == "__main__":
    main()
