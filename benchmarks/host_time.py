# SPDX-License-Identifier: Apache-2.0
"""What the host does in a call of the op, outside CUDA graphs: microseconds a linear.

    python benchmarks/host_time.py --shape llama-3-8b --weights fp8 int4 --tokens 2048

Calls the linears of a whole model one after another on a GPU, with random weights, as a
prompt does. Each pass is timed twice: until the host has issued the last launch, and
until the device has finished. Where the first is the longer of the two, the device
waits for the host. --profile prints the functions that take the host's time.
"""

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from vllm_rsparse.bench.inputs import make_inputs
from vllm_rsparse.bench.layers import SHAPES
from vllm_rsparse.formats.fp8 import FP8
from vllm_rsparse.op import layers, ops
from vllm_rsparse.op.backends import Backend, routes_of

# Models that are quantized in groups have these.
GROUP = 128

Calls = list[Callable[[], object]]


def make_calls(shape: str, weights: str, tokens: int, copies: int) -> Calls:
    """A call of the op for every linear; all take the dense route.

    Args:
        shape: a key of ``SHAPES``.
        weights: format of the weights.
        tokens: rows of x.
        copies: decoder layers.
    """
    calls: Calls = []
    for index in range(copies):
        for plain in SHAPES[shape]:
            layer = plain.stored_as(weights, GROUP)
            made = make_inputs(layer, tokens, torch.bfloat16, "cuda", seed=index)
            operands = made.operands
            number = layers.next_layer()
            layers.set_layer(operands.thresholds, number)
            rounding = routes_of(Backend.TRITON, FP8).dense_quantised
            if weights == FP8.name and rounding is not None:
                # As the engine does where the base model rounds x too.
                stored = operands.weight
                layers.set_dense_layer(
                    number, lambda x, bias, w=stored, route=rounding: route(x, w, bias)
                )
            arguments = (made.x, *operands.schema_args(), 0, int(Backend.TRITON))
            calls.append(partial(ops.linear, *arguments))
    return calls


def run(calls: Sequence[Callable[[], object]]) -> tuple[float, float]:
    """Seconds until all is issued, and until all is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    issued = time.perf_counter() - start
    torch.cuda.synchronize()
    return issued, time.perf_counter() - start


def main() -> None:
    """Measure every format and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--weights", nargs="+", default=["fp8", "int4", "int8-planes"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("host_time.py needs a CUDA device: it times launches on one")
    for weights in args.weights:
        with torch.inference_mode():
            calls = make_calls(args.shape, weights, args.tokens, args.layers)
            run(calls)
            issued, done = zip(*(run(calls) for _ in range(args.repeats)), strict=True)
            each = [1e6 * seconds / len(calls) for seconds in issued]
            wall = [1e6 * seconds / len(calls) for seconds in done]
            print(
                f"{weights}: us a linear, median (least):"
                f" issued {statistics.median(each):.1f} ({min(each):.1f}),"
                f" done {statistics.median(wall):.1f} ({min(wall):.1f})",
                flush=True,
            )
            if args.profile:
                profile = cProfile.Profile()
                profile.runcall(run, calls)
                pstats.Stats(profile).sort_stats("tottime").print_stats(20)
            del calls
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
