# SPDX-License-Identifier: Apache-2.0
"""Search for launch configurations: compile in parallel, time coarsely, then finely."""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from vllm_rsparse.bench.inputs import Inputs, make_inputs, rotation
from vllm_rsparse.bench.layers import Layer
from vllm_rsparse.bench.measure import check, time_dense
from vllm_rsparse.bench.timing import time_calls
from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.kernels.rsparse_linear import listed_channels
from vllm_rsparse.op import reference, tuning
from vllm_rsparse.op.launch_defaults import VECTOR_TOKENS
from vllm_rsparse.op.triton_backend import rsparse_linear
from vllm_rsparse.op.tuning import TunedEntry

# How many of the coarse ranking are timed again more accurately.
_FINALISTS = 5
# More splits would spend their time on adding partial sums.
_MOST_SPLITS = 128

# (block_n, block_k, warps, stages, use_dot, listed)
_Kind = tuple[int, int, int, int, bool, bool]
_LISTED: list[_Kind] = [
    (block_n, block_k, warps, 1, False, True)
    for block_n, block_k, warps in (
        (128, 32, 1),
        (256, 16, 1),
        (512, 16, 2),
        (1024, 8, 4),
        (1024, 16, 4),
    )
]
# Half a warp or more reads one row: an unwanted row costs almost nothing.
_MASKED: list[_Kind] = [
    (block_n, block_k, warps, 1, False, False)
    for block_n, block_k, warps in ((128, 32, 1), (128, 64, 2), (256, 16, 1))
]
_DOT: list[_Kind] = [
    (block_n, 32, 4, stages, True, False) for block_n in (128, 256) for stages in (1, 3)
]


def tune(
    layers: list[Layer], tokens: list[int], dtype: torch.dtype, facts: dict[str, Any]
) -> Path:
    """Search every distinct shape and merge the results into the device's table.

    Args:
        layers: shapes to search.
        tokens: numbers of tokens to search.
        dtype: of the weights.
        facts: provenance for the table.

    Returns:
        The table's path, in ``tuning.CONFIG_DIR``.

    Raises:
        RuntimeError: a configuration gave a wrong result.
        OSError: the table cannot be written.
    """
    path = tuning.config_path(torch.cuda.get_device_name())
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}; run as the package's owner")
    table = {
        (e.n, e.k, e.dtype, e.tokens): e
        for e in (tuning.read_table(path) if path.exists() else [])
    }
    shapes = {(layer.n, layer.k): layer for layer in layers}
    jobs = [(layer, count) for layer in shapes.values() for count in tokens]
    searched = {job: candidates(*job) for job in jobs}
    fitting = _compile_all(searched, dtype)
    for layer, count in jobs:
        inputs = rotation(layer, count, dtype, "cuda")
        best_us, best = _fastest(inputs, fitting[layer, count])
        expected = inputs[0].call(reference.rsparse_linear)
        out = inputs[0].call(rsparse_linear, config=best)
        check(out, expected, str(best))
        entry = TunedEntry(
            layer.n,
            layer.k,
            inputs[0].operands.weight.kind,
            count,
            best,
            round(best_us, 2),
            round(time_dense(inputs).median, 2),
        )
        table[entry.n, entry.k, entry.dtype, count] = entry
        print(entry, file=sys.stderr, flush=True)
        # Written after every shape, so that an interrupted search keeps its results.
        tuning.write_table(path, list(table.values()), facts)
        del inputs
    return path


def candidates(
    layer: Layer, tokens: int, processors: int | None = None
) -> list[LaunchConfig]:
    """Configurations worth trying for a shape.

    Splits are powers of two, and numbers that give every multiprocessor the same number
    of programs: 448 programs on 132 of them leave a quarter idle at the end.

    Args:
        layer: the shape.
        tokens: rows of the call.
        processors: multiprocessors; default those of the current CUDA device.
    """
    if processors is None:
        properties = torch.cuda.get_device_properties("cuda")
        processors = properties.multi_processor_count
    kinds = _LISTED + _MASKED if tokens <= VECTOR_TOKENS else _DOT
    found = []
    for block_n, block_k, warps, stages, use_dot, listed in kinds:
        tiles = sum(-(-size // block_n) for size in layer.shard_sizes)
        even = {waves * processors // tiles for waves in (1, 2, 3, 4, 6, 8, 12)}
        for split_k in sorted({8, 16, 32, 64} | even):
            warps_each = tiles * split_k * warps / processors
            if not 1 <= split_k <= _MOST_SPLITS or not 4 <= warps_each <= 48:
                continue
            if split_k * block_k > layer.k * (2 if listed else 1):
                continue
            found.append(
                LaunchConfig(block_n, block_k, split_k, warps, stages, use_dot, listed)
            )
    return found


def _compile_all(
    searched: dict[tuple[Layer, int], list[LaunchConfig]], dtype: torch.dtype
) -> dict[tuple[Layer, int], list[LaunchConfig]]:
    """Fill Triton's cache on disk; returns the configurations that fit the device.

    Kernels depend on a shape only through ``_kernel_key``, so each is compiled once.
    """
    first: dict[tuple, tuple[Layer, int, LaunchConfig]] = {}
    for (layer, tokens), configs in searched.items():
        for config in configs:
            first.setdefault(
                _kernel_key(layer, tokens, config), (layer, tokens, config)
            )
    workers = max(1, (os.cpu_count() or 2) - 2)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = {key: pool.submit(_compile, *job, dtype) for key, job in first.items()}
        fits = {key: job.result() for key, job in jobs.items()}
    return {
        (layer, tokens): [c for c in configs if fits[_kernel_key(layer, tokens, c)]]
        for (layer, tokens), configs in searched.items()
    }


def _kernel_key(layer: Layer, tokens: int, config: LaunchConfig) -> tuple:
    channels = listed_channels(layer.k, config.split_k) if config.listed else None
    even = all(size % config.block_n == 0 for size in layer.shard_sizes)
    kind = (config.block_n, config.block_k, config.num_warps, config.num_stages)
    # Triton specialises on 1 and on multiples of 16, hence on the tokens here.
    return (
        kind,
        config.use_dot,
        config.listed,
        channels,
        even,
        tokens,
        len(layer.shard_sizes),
    )


@cache
def _compile_inputs(layer: Layer, tokens: int, dtype: torch.dtype) -> Inputs:
    return make_inputs(layer, tokens, dtype, "cuda", seed=0)


def _compile(
    layer: Layer, tokens: int, config: LaunchConfig, dtype: torch.dtype
) -> bool:
    inputs = _compile_inputs(layer, tokens, dtype)
    try:
        inputs.call(rsparse_linear, config=config)
        torch.cuda.synchronize()
    except Exception as error:
        # Triton's OutOfResources has moved between modules; its name has not.
        if type(error).__name__ == "OutOfResources":
            return False
        raise
    return True


def _fastest(
    inputs: list[Inputs], configs: list[LaunchConfig]
) -> tuple[float, LaunchConfig]:
    """Microseconds and configuration of the fastest; the best ones are timed twice."""

    def measure(config: LaunchConfig, calls: int, replays: int) -> float:
        timed = [partial(one.call, rsparse_linear, config=config) for one in inputs]
        return time_calls(timed, calls, replays).median

    coarse = sorted(configs, key=lambda config: measure(config, 24, 4))
    fine = [(measure(config, 100, 9), config) for config in coarse[:_FINALISTS]]
    return min(fine, key=lambda pair: pair[0])
