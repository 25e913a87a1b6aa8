# SPDX-License-Identifier: Apache-2.0
"""Search for launch configurations: compile in parallel, time coarsely, then finely."""

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_rsparse.arguments import writing
from vllm_rsparse.bench.candidates import candidates, dense_candidates
from vllm_rsparse.bench.gate import allowed, check, exact_dense
from vllm_rsparse.bench.inputs import Inputs, make_inputs, rotation
from vllm_rsparse.bench.layers import Layer
from vllm_rsparse.bench.measure import time_dense
from vllm_rsparse.bench.timing import time_calls
from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.kernels.rsparse_linear import listed_channels
from vllm_rsparse.op import reference, tables
from vllm_rsparse.op.backends import Backend
from vllm_rsparse.op.tables import DENSE, SPARSE, TunedEntry
from vllm_rsparse.op.triton_backend import dense_linear, rsparse_linear
from vllm_rsparse.op.tuning import device_of

# What to choose where the table cannot be written.
OTHER_FOLDER = "another folder with --output"
# How many of the coarse ranking are timed again more accurately, and how many inputs
# the coarse one rotates over: 100 MB of the smallest layer.
_FINALISTS = 4
_COARSE_INPUTS = 24
# Of the time allowed, for compiling; the rest is for timing. What the compilers are at
# when that ends they finish, so that every layer gets a least time of its own: that of
# some 50 configurations.
_COMPILING = 0.6
_LEAST_SECONDS = 1.0
_CANDIDATES = {SPARSE: candidates, DENSE: dense_candidates}


@dataclass
class _Job:
    """A layer, a number of tokens and a route, and the configurations to try."""

    layer: Layer
    tokens: int
    route: str
    configs: list[LaunchConfig]
    total: int = field(init=False)
    default: LaunchConfig = field(init=False)

    def __post_init__(self) -> None:
        self.total = len(self.configs)
        # Used without a table; timed as the others are, to say what the search gained.
        self.default = self.configs[0]

    @property
    def label(self) -> str:
        return (
            f"{self.layer.n} x {self.layer.k} {self.layer.format}, {self.tokens} tokens"
        )


def tune(
    layers: Sequence[Layer],
    tokens: Sequence[int],
    routes: Sequence[str],
    dtype: torch.dtype,
    device: str,
    path: Path,
    seconds: float,
    facts: dict[str, Any],
) -> None:
    """Search every distinct shape and merge the results into a device's table.

    Args:
        layers: shapes to search.
        tokens: numbers of tokens to search.
        routes: ``sparse``, ``dense`` or both.
        dtype: of activations.
        device: "cuda"; "cpu" with Triton's interpreter, for tests.
        path: of the table.
        seconds: how long it may take. The default configuration of a shape and those
            that resemble it are tried first; what is left out is printed.
        facts: provenance for the table.

    Raises:
        RuntimeError: a configuration gave a wrong result, or a default one fails.
        SettingError: the table cannot be written.
    """
    end = time.monotonic() + seconds
    table = {
        (e.problem, e.tokens, e.route): e
        for e in (tables.read_table(path) if path.exists() else [])
    }
    processors = device_of(torch.device(device)).processors
    shapes = {(one.n, one.k, one.format, one.group): one for one in layers}
    jobs = [
        _Job(layer, count, route, configs)
        for layer in shapes.values()
        for count in tokens
        for route in routes
        if (configs := _CANDIDATES[route](layer, count, processors))
    ]
    if device == "cuda":
        _compile_all(jobs, dtype, end - (1 - _COMPILING) * seconds)
    for index, job in enumerate(jobs):
        left = (end - time.monotonic()) / (len(jobs) - index)
        share = max(_LEAST_SECONDS, left)
        entry = _tune_layer(job, dtype, device, time.monotonic() + share)
        table[entry.problem, job.tokens, job.route] = entry
        # Written after every shape, so that an interrupted search keeps its results.
        with writing(path, elsewhere=OTHER_FOLDER):
            tables.write_table(path, list(table.values()), facts)


def _tune_layer(
    job: _Job, dtype: torch.dtype, device: str, deadline: float
) -> TunedEntry:
    """The entry of the fastest configuration."""
    inputs = rotation(job.layer, job.tokens, dtype, device)
    weight = inputs[0].operands.weight
    coarse: list[tuple[float, LaunchConfig]] = []
    for config in job.configs:
        if coarse and time.monotonic() > deadline:
            break
        taken = _measure(inputs[:_COARSE_INPUTS], job.route, config, 24, 4)
        coarse.append((taken, config))
    best_first = sorted(coarse, key=lambda pair: pair[0])[:_FINALISTS]
    finalists = dict.fromkeys([job.default, *(config for _, config in best_first)])
    fine = {config: _measure(inputs, job.route, config, 100, 9) for config in finalists}
    best = min(fine, key=lambda config: fine[config])
    if job.route == SPARSE:
        expected = inputs[0].call(reference.rsparse_linear)
    else:
        expected = exact_dense(inputs[0])
    limit = allowed(Backend.TRITON, inputs[0].x)
    check(_call(inputs[0], job.route, best), expected, str(best), limit)
    dense = time_dense(inputs, Backend.TRITON).median
    print(
        f"{job.label}, {job.route}: {fine[best]:.2f} us with {best}; default"
        f" {fine[job.default]:.2f}, dense {dense:.2f};"
        f" {len(coarse)} of {job.total} configurations tried",
        file=sys.stderr,
        flush=True,
    )
    return TunedEntry(
        weight.n,
        weight.k,
        weight.kind,
        job.tokens,
        best,
        round(fine[best], 2),
        round(dense, 2),
        weight.group,
        job.route,
    )


def _call(inputs: Inputs, route: str, config: LaunchConfig) -> Tensor:
    """The product of a route with a configuration."""
    if route == SPARSE:
        return inputs.call(rsparse_linear, config=config)
    return dense_linear(inputs.x, inputs.operands.weight, None, config)


def _measure(
    inputs: list[Inputs], route: str, config: LaunchConfig, calls: int, replays: int
) -> float:
    timed = [partial(_call, one, route, config) for one in inputs]
    return time_calls(timed, calls, replays).median


def _compile_all(jobs: list[_Job], dtype: torch.dtype, deadline: float) -> None:
    """Fill Triton's cache on disk; leaves the configurations that can be timed.

    Kernels depend on a shape only through ``_kernel_key``, so each is compiled once.
    Those that do not fit the device, and those that are not ready in time, go.

    Raises:
        RuntimeError: one that is used without a table does not run.
    """
    workers = max(1, (os.cpu_count() or 2) - 2)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    futures: dict[tuple, Future[str]] = {}
    # Every job's likeliest configuration first.
    longest = max(len(job.configs) for job in jobs)
    for rank in range(longest):
        for job in jobs:
            if rank < len(job.configs):
                config = job.configs[rank]
                key = _kernel_key(job, config)
                if key not in futures:
                    task = (job.layer, job.tokens, job.route, config, dtype)
                    futures[key] = pool.submit(_compile, *task)
    wait(futures.values(), max(0.0, deadline - time.monotonic()))
    # What is used without a table is always waited for.
    keys = {_kernel_key(job, job.default) for job in jobs}
    for key, future in futures.items():
        if key not in keys:
            future.cancel()
    pool.shutdown()
    results = {
        key: future.result()
        for key, future in futures.items()
        if not future.cancelled()
    }
    for problem in sorted({problem for problem in results.values() if problem}):
        print(f"left out: {problem}", file=sys.stderr)
    if any(results[key] for key in keys):
        raise RuntimeError("a configuration that is used without a table does not run")
    fits = {key for key, problem in results.items() if not problem}
    for job in jobs:
        job.configs = [
            config for config in job.configs if _kernel_key(job, config) in fits
        ]


def _kernel_key(job: _Job, config: LaunchConfig) -> tuple:
    """What a compiled kernel depends on."""
    layer = job.layer
    sizes = layer.shard_sizes if job.route == SPARSE else (layer.n,)
    channels: int | None = None
    if config.listed:
        channels = listed_channels(layer.k, config.split_k)
    elif config.packed:
        # Blocks of a program, as a power of two.
        span = min(config.block_k, layer.group or 128)
        blocks = math.ceil(math.ceil(layer.k / span) / config.split_k)
        channels = (blocks - 1).bit_length()
    starts = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return (
        job.route,
        layer.format,
        layer.group,
        config.block_n,
        config.block_k,
        config.num_warps,
        config.num_stages,
        config.use_dot,
        config.listed,
        config.packed,
        channels,
        all(size % config.block_n == 0 for size in sizes),
        all(start % 16 == 0 for start in starts),
        layer.k % max(config.block_k, 16) == 0,
        # Triton specialises on 1 and on multiples of 16, hence on the tokens here.
        job.tokens,
        len(sizes),
        any(layer.ranks),
    )


@lru_cache(maxsize=4)
def _compile_inputs(layer: Layer, tokens: int, dtype: torch.dtype) -> Inputs:
    return make_inputs(layer, tokens, dtype, "cuda", seed=0)


def _compile(
    layer: Layer,
    tokens: int,
    route: str,
    config: LaunchConfig,
    dtype: torch.dtype,
) -> str:
    """Why the device cannot run a configuration; empty if it can."""
    inputs = _compile_inputs(layer, tokens, dtype)
    try:
        _call(inputs, route, config)
        torch.cuda.synchronize()
    # Errors of the compiler are of many classes, and some cannot be sent to the parent.
    except Exception as error:
        message = str(error).strip().splitlines()[:1]
        return f"{config}: {type(error).__name__} {' '.join(message)}"
    return ""
