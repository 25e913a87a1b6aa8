# SPDX-License-Identifier: Apache-2.0
"""Search for launch configurations: compile in parallel, time coarsely, then finely."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache

import torch
from ops_cases import Inputs, Layer, make_inputs
from ops_timing import time_calls

from vllm_rsparse.kernels.rsparse_linear import rsparse_linear
from vllm_rsparse.tuning import LaunchConfig

# How many of the coarse ranking are timed again with care.
FINALISTS = 6


def candidates(layer: Layer, tokens: int) -> list[LaunchConfig]:
    """Configurations worth a try: 1 to 30 programs for each of an H200's processors."""
    kinds = _dot_kinds() if tokens > 1 else []
    if tokens <= 4:
        kinds += _vector_kinds()
    return [
        LaunchConfig(block_n, block_k, split_k, warps, stages, use_dot)
        for block_n, block_k, warps, stages, use_dot in kinds
        for split_k in (1, 2, 4, 8, 16, 32, 64)
        if 120 <= -(-layer.n // block_n) * split_k <= 4000
        and layer.k >= split_k * block_k
    ]


Kind = tuple[int, int, int, int, bool]


def _vector_kinds() -> list[Kind]:
    """Half a warp or more reads one row: a row nobody wants costs next to nothing."""
    return [
        (block_n, warps * 256 // block_n * passes, warps, 1, False)
        for block_n, choices in {128: (1, 2, 4), 256: (1, 2), 512: (2,)}.items()
        for warps in choices
        for passes in (8, 16, 32)
    ]


def _dot_kinds() -> list[Kind]:
    return [
        (block_n, block_k, 4, stages, True)
        for block_n in (128, 256)
        for block_k in (32, 64)
        for stages in (3, 5)
    ]


@cache
def _compile_inputs(
    layer: Layer, tokens: int, dtype: torch.dtype, rho: float
) -> Inputs:
    return make_inputs(layer, tokens, dtype, rho, seed=0)


def _compile(
    layer: Layer, tokens: int, dtype: torch.dtype, rho: float, config: LaunchConfig
) -> bool:
    inputs = _compile_inputs(layer, tokens, dtype, rho)
    try:
        rsparse_linear(*inputs.op_args(), config)
        torch.cuda.synchronize()
    except Exception as error:
        # Triton's OutOfResources has moved between modules; its name has not.
        if type(error).__name__ == "OutOfResources":
            return False
        raise
    return True


class Tuner:
    """Keeps the compiling processes; use as a context manager."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(
            max(1, (os.cpu_count() or 2) - 2), multiprocessing.get_context("spawn")
        )

    def __enter__(self) -> "Tuner":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def compile(
        self,
        layer: Layer,
        tokens: int,
        dtype: torch.dtype,
        rho: float,
        configs: list[LaunchConfig],
    ) -> list[LaunchConfig]:
        """Fill Triton's cache on disk; those that fit the device."""
        jobs = [
            self._pool.submit(_compile, layer, tokens, dtype, rho, config)
            for config in configs
        ]
        return [c for c, job in zip(configs, jobs, strict=True) if job.result()]


def rank_configs(
    inputs: list[Inputs], configs: list[LaunchConfig]
) -> list[tuple[float, LaunchConfig]]:
    """(microseconds, configuration) of all, fastest first; the best timed twice."""

    def measure(config: LaunchConfig, calls: int, replays: int) -> float:
        timed = [
            lambda one=one: rsparse_linear(*one.op_args(), config) for one in inputs
        ]
        return time_calls(timed, calls, replays).median

    coarse = sorted(
        ((measure(config, 32, 4), config) for config in configs), key=lambda r: r[0]
    )
    fine = [(measure(config, 100, 9), config) for _, config in coarse[:FINALISTS]]
    return sorted(fine, key=lambda r: r[0]) + coarse[FINALISTS:]
