# SPDX-License-Identifier: Apache-2.0
"""Dense against sparse through vLLM itself: its model code and the served kernels.

Each window is a prompt whose log probabilities vLLM returns. A step takes one window,
and the switch point sends all of it down either the sparse or the dense route: no part
of a window can be dense while the rest is sparse. vLLM returns only the probabilities
of the label and of the most likely token, so there is no KL divergence.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_rsparse import envs
from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.errors import ArtifactError, SettingError
from vllm_rsparse.evaluate.measure import Loss, layers_sparsity, sparsity_by_kind

WORKER = "vllm_rsparse.evaluate.engine_worker"


@dataclass(frozen=True)
class EngineRun:
    """What an engine ran on.

    Attributes:
        device: vLLM's device type, "cpu" or "cuda".
        dtype: compute dtype, "float32", "bfloat16" or "float16".
        vllm: its version.
    """

    device: str
    dtype: str
    vllm: str


@dataclass(frozen=True)
class Scores:
    """Results of one engine on the windows.

    Attributes:
        log_probabilities: of the label of each counted prediction, window after window.
        likeliest: the most likely token at each of them.
        kept: fraction of channels kept by each plane of the weight (one where it is
            read whole), by linear of the checkpoint, over all positions; empty for a
            dense engine.
        run: what it ran on.
    """

    log_probabilities: list[float]
    likeliest: list[int]
    kept: dict[str, list[float]]
    run: EngineRun


def check_engine(prepared: PreparedDirectory, window: int) -> None:
    """Refuse what vLLM could not run, before starting anything.

    Raises:
        SettingError: vLLM is not installed, or the window leaves no room.
    """
    if importlib.util.find_spec("vllm") is None:
        raise SettingError(
            "--engine vllm: vLLM is not installed in this environment; install it, or"
            " use --engine torch"
        )
    longest = prepared.config.get("max_position_embeddings")
    if longest and window >= longest:
        raise SettingError(
            f"--window {window}: vLLM generates one token after each window, which"
            f" leaves {longest - 1} of the model's {longest} positions"
            " (max_position_embeddings)"
        )


def measure_served(
    prepared: Sequence[PreparedDirectory], windows: Tensor, first: int, dtype: str
) -> tuple[list[Loss], EngineRun]:
    """Evaluate artifacts of one base model, each in its own engine.

    Args:
        prepared: one or more artifacts for one base model.
        windows: int64 [windows, positions]; every position is sparse.
        first: predictions made before this position are not counted.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on CPU, else
            bfloat16.

    Raises:
        ArtifactError: an engine failed; its output is on standard error.
    """
    dense = run_engine(prepared[0], windows, first, dtype, sparse=False)
    losses = []
    for one in prepared:
        sparse = run_engine(one, windows, first, dtype, sparse=True)
        entries = {
            name: entry.counted(sparse.kept[name])
            for name, entry in one.artifact.info.entries.items()
        }
        pairs = zip(dense.likeliest, sparse.likeliest, strict=True)
        tokens = len(sparse.likeliest)
        losses.append(
            Loss(
                directory=str(one.path),
                target_sparsity=one.artifact.info.sparsity,
                achieved_sparsity=layers_sparsity(entries),
                by_kind=sparsity_by_kind(entries),
                perplexity_dense=_perplexity(dense),
                perplexity_sparse=_perplexity(sparse),
                kl_divergence=None,
                kl_standard_error=None,
                top1_agreement=sum(a == b for a, b in pairs) / tokens,
                tokens=tokens,
                artifact_sha256=one.artifact.sha256,
            )
        )
    return losses, dense.run


def _perplexity(scores: Scores) -> float:
    values = scores.log_probabilities
    return math.exp(-math.fsum(values) / len(values))


def run_engine(
    prepared: PreparedDirectory, windows: Tensor, first: int, dtype: str, sparse: bool
) -> Scores:
    """Score windows in an engine in its own process, which frees its memory at the end.

    Args:
        prepared: what to run.
        windows: int64 [windows, positions].
        first: predictions made before this position are not counted.
        dtype: as for :func:`measure_served`.
        sparse: whether every position is sparse, or dense.

    Raises:
        ArtifactError: the engine failed; its output is on standard error.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-rsparse-") as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        document = {
            "model": str(prepared.path),
            "dtype": dtype,
            "windows": windows.tolist(),
            "first": first,
            "result": str(result),
        }
        job.write_text(json.dumps(document))
        environment = os.environ | {
            envs.MAX_SPARSE_TOKENS: str(windows.shape[1] if sparse else 0),
            # What is kept is counted in the engine's own process.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        done = subprocess.run(
            [sys.executable, "-m", WORKER, job],
            env=environment,
            check=False,
            stdout=2,  # vLLM's log; standard output is for the table
        )
        if done.returncode != 0 or not result.exists():
            raise ArtifactError(
                f"{prepared.path}: vLLM failed on it (exit status"
                f" {done.returncode}); its messages are above. --engine torch works"
                " without vLLM"
            )
        raw: dict[str, Any] = json.loads(result.read_text())
    return Scores(**{**raw, "run": EngineRun(**raw["run"])})
