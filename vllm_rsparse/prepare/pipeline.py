# SPDX-License-Identifier: Apache-2.0
"""``prepare`` from end to end."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_rsparse import __version__
from vllm_rsparse.artifact import (
    ARTIFACT_DIR,
    FORMAT_VERSION,
    JSON_NAME,
    TENSORS_NAME,
    Artifact,
    ArtifactInfo,
    LinearEntry,
    file_sha256,
)

from .calibrate import calibrate_linear
from .checkpoint import Checkpoint, resolve_model
from .errors import PrepareError
from .linears import Linear, find_linears
from .observers import LayerInputs, input_channels
from .options import DEFAULT_TOKENS, PrepareOptions
from .output import StagedOutput, check_output, write_text
from .planning import Planned, plan_linears, search_journal
from .propagate import sparse_linears, stage_input, stages
from .recipes import load_recipe
from .streaming import StreamedModel
from .texts import choose_windows, load_tokenizer, read_texts
from .writer import SafetensorsWriter, TensorSpec

logger = logging.getLogger(__name__)


def prepare(options: PrepareOptions) -> ArtifactInfo:
    """Write a prepared directory for a dense model.

    Args:
        options: validated settings.

    Returns:
        What was written to ``rsparse.json``.

    Raises:
        PrepareError: bad input, unsupported model, unusable output directory.
        OSError: the disk is full or a file cannot be written.
    """
    # What can be told at once is told before a download and before the tokenizer runs.
    check_output(options.output, options.overwrite)
    recipe = load_recipe(options.recipe)
    texts = read_texts(options.calibration_data)
    device = _device(options.device)
    checkpoint = Checkpoint(resolve_model(options.model, options.revision))
    linears, stored_dtype = find_linears(checkpoint)
    dtype = _compute_dtype(options.dtype, device, stored_dtype)
    staged = StagedOutput(options.output, checkpoint.directory, options.overwrite)
    model = StreamedModel(checkpoint, device, dtype)
    text = choose_windows(
        load_tokenizer(checkpoint.directory),
        texts,
        options.samples,
        _window_tokens(options.tokens, checkpoint.config),
        options.seed,
        model.vocab_size,
    )
    journal = search_journal(recipe, options, model, text.windows)
    with staged, journal:
        with _hint_when_out_of_memory():
            planned = plan_linears(
                recipe, options, model, linears, text.windows, journal
            )
        calibrated = _calibrate(
            model,
            linears,
            planned,
            text.windows,
            staged.artifact / TENSORS_NAME,
            getattr(torch, stored_dtype),
            options.seed,
        )
        digest = file_sha256(staged.artifact / TENSORS_NAME)
        info = ArtifactInfo(
            sparsity=options.sparsity,
            linears=calibrated.entries,
            dtype=stored_dtype,
            tensors_sha256=digest,
            provenance={
                "vllm_rsparse": __version__,
                "torch": torch.__version__,
                "transformers": version("transformers"),
                "base_model": options.model,
                "base_directory": str(checkpoint.directory),
                "recipe": {
                    "name": recipe.name,
                    "sparsity": options.sparsity,
                    "rho": planned.rho,
                },
                "method": {
                    "score": recipe.score,
                    "allocation": recipe.allocation,
                    "activations": recipe.activations,
                    "correction": recipe.correction,
                    "factors": recipe.factors,
                },
                "calibration": text.provenance
                | {"device": device.type, "dtype": _name(dtype)},
                "svd": calibrated.svd,
            },
        )
        write_text(staged.artifact / JSON_NAME, info.to_json())
        # Read back as the engine will: a fault of ours shows here and not in serving.
        Artifact(staged.artifact)
        staged.add_base_files(checkpoint, options.copy_weights)
        staged.write_config(
            checkpoint.config
            | {
                "quantization_config": {
                    "quant_method": "rsparse",
                    "format_version": FORMAT_VERSION,
                    "artifact": ARTIFACT_DIR,
                    "artifact_sha256": digest,
                    "sparsity": options.sparsity,
                }
            }
        )
        staged.commit()
    if options.save_recipe is not None:
        options.save_recipe.write_text(planned.recipe.to_json(), encoding="utf-8")
    return info


@dataclass(frozen=True)
class _Calibrated:
    """JSON entries by name, and how the factors were found."""

    entries: dict[str, LinearEntry]
    svd: dict[str, Any]


def _calibrate(
    model: StreamedModel,
    linears: list[Linear],
    planned: Planned,
    windows: Tensor,
    path: Path,
    stored_dtype: torch.dtype,
    seed: int,
) -> _Calibrated:
    """Go through the layers once: observe, calibrate, write, carry hidden states on."""
    entries: dict[str, LinearEntry] = {}
    residuals: dict[str, float] = {}
    inputs_bytes = input_channels(linears) * windows.numel() * model.dtype.itemsize
    logger.info(
        "calibrating %d linears on %d windows of %d tokens, %s on %s; the inputs of one"
        " layer take %.1f GiB",
        len(linears), *windows.shape, _name(model.dtype), model.device,
        inputs_bytes / 2**30,
    )  # fmt: skip
    recipe, first = planned.recipe, planned.first
    with (
        SafetensorsWriter(path, _specs(linears, planned, stored_dtype)) as writer,
        tqdm(total=len(linears), desc="prepare", unit="linear") as progress,
        _hint_when_out_of_memory(),
    ):

        def calibrate(linear: Linear, x: Tensor) -> dict[str, Tensor]:
            weight = model.checkpoint.read([linear.weight])[linear.weight]
            scale = planned.scales.get(linear.name)
            metric = planned.metrics.get(linear.name)
            result = calibrate_linear(
                weight.to(model.device),
                x,
                planned.plans[linear.name],
                _seed(seed, linear.name),
                None if scale is None else scale.to(model.device),
                recipe.correction,
                None if metric is None else metric.to(model.device),
            )
            for suffix, tensor in result.tensors.items():
                writer.write(f"{linear.name}.{suffix}", tensor)
            entries[linear.name] = result.entry
            if result.factors is not None:
                method = result.factors.method
                worst = max(residuals.get(method, 0.0), result.factors.residual)
                residuals[method] = worst
            progress.update()
            return result.tensors

        hidden = model.embed(windows)
        for index, members in groupby(linears, key=lambda linear: linear.layer):
            if recipe.activations == "dense":
                inputs = LayerInputs(windows.numel())
                with model.layer(index) as layer, inputs.observe(layer):
                    model.run_layer(index, hidden)
                for linear in members:
                    calibrate(linear, inputs[linear.kind])
                continue
            with model.layer(index) as layer, sparse_linears(layer) as sparse:
                for stage in stages(members):
                    x = stage_input(model, stage[0], layer, hidden, first)
                    for linear in stage:
                        sparse.install(linear.kind, calibrate(linear, x), first)
                model.run_layer(index, hidden)
    if "randomised" in residuals:
        logger.info(
            "randomised SVD: singular pairs are off by at most %.1e, relative",
            residuals["randomised"],
        )
    return _Calibrated(entries, {"largest_residual": residuals})


@contextmanager
def _hint_when_out_of_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PrepareError(
            f"out of device memory ({error}); lower --calibration-samples or"
            " --calibration-tokens, or use --device cpu"
        ) from error


def _specs(
    linears: list[Linear], planned: Planned, dtype: torch.dtype
) -> dict[str, TensorSpec]:
    specs = {}
    for linear in linears:
        n, k = linear.shape
        specs[f"{linear.name}.thresholds"] = TensorSpec((k,), torch.float32)
        rank = planned.plans[linear.name].rank(linear.shape)
        if rank > 0:
            specs[f"{linear.name}.u"] = TensorSpec((n, rank), dtype)
            specs[f"{linear.name}.v"] = TensorSpec((rank, k), dtype)
        if planned.recipe.correction:
            specs[f"{linear.name}.bias"] = TensorSpec((n,), torch.float32)
    return specs


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise PrepareError(
            "--device cuda: this torch sees no CUDA device; use --device cpu"
        )
    return torch.device(name)


def _compute_dtype(name: str, device: torch.device, stored: str) -> torch.dtype:
    if name == "auto":
        name = "float32" if device.type == "cpu" else stored
    return getattr(torch, name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _window_tokens(tokens: int | None, config: dict[str, Any]) -> int:
    longest = config.get("max_position_embeddings")
    if tokens is None:
        return min(DEFAULT_TOKENS, longest) if longest else DEFAULT_TOKENS
    if longest and tokens > longest:
        raise PrepareError(
            f"--calibration-tokens {tokens} is more than the model's length of"
            f" {longest} (max_position_embeddings)"
        )
    return tokens


def _seed(seed: int, name: str) -> int:
    """A seed of each linear's own, so that the order of work does not matter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
