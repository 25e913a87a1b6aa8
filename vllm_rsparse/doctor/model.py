# SPDX-License-Identifier: Apache-2.0
"""Checks of a prepared directory, and a layer run against the definition of the op."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vllm_rsparse.artifact.locate import holds_artifact
from vllm_rsparse.artifact.prepared import PreparedDirectory, open_artifact
from vllm_rsparse.artifact.tensors import Artifact, LinearTensors
from vllm_rsparse.doctor.finding import Finding, Level
from vllm_rsparse.doctor.layer import FusedLayer, compare
from vllm_rsparse.errors import ArtifactError, CheckpointError
from vllm_rsparse.formats.base import INPUT_DTYPES
from vllm_rsparse.formats.registry import format_of_name, load_time_format
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.checkpoint_files import DOWNLOAD_AGAIN, INDEX_NAME
from vllm_rsparse.model.families import by_engine_layer
from vllm_rsparse.model.language_model import LanguageModel
from vllm_rsparse.model.names import LinearName
from vllm_rsparse.op.backends import resolve_backend
from vllm_rsparse.text_table import counted, size_of
from vllm_rsparse.validation import read_json


def artifact(directory: Path) -> Iterator[Finding]:
    """Both files, their digests, and every tensor in them."""
    opened = open_artifact(directory)
    for name in opened.info.linears:
        opened.read(name)
    info = opened.info
    size = size_of(opened.tensors_path.stat().st_size)
    yield Finding(
        Level.OK,
        "artifact",
        f"{opened.directory}: {len(info.linears)} linears, sparsity"
        f" {info.achieved_sparsity:.3f} on the calibration text, {info.dtype},"
        f" {size}; digest and all values checked",
    )


def base(directory: Path) -> Iterator[Finding]:
    """Whether the base model's files hold every linear of the artifact in its shape.

    Only headers are read, so that a model of any size takes seconds. A file that was
    cut short is found too, as a header names the size of what follows.

    Raises:
        CheckpointError: a file is missing or damaged.
        ArtifactError: the artifact was prepared from another model.
    """
    if holds_artifact(directory):
        return  # an artifact alone names no base model
    prepared = PreparedDirectory.open(directory)
    checkpoint = prepared.checkpoint
    _refuse_missing_tensors(checkpoint)
    model = LanguageModel(checkpoint)
    linears = prepared.artifact.info.linears
    for name, entry in linears.items():
        parsed = LinearName.parse(name)
        shape = None
        if parsed.path == model.layer_path and parsed.layer is not None:
            shape = model.linear_shape(parsed.layer, parsed.kind)
        if shape != entry.shape:
            found = "is missing" if shape is None else f"is {list(shape)}"
            raise ArtifactError(
                f"{directory}: the artifact's linear {name} {list(entry.shape)} {found}"
                " in the base model; the artifact was prepared from another model:"
                " prepare this one"
            )
    files = counted(len(checkpoint.weight_files), "file")
    yield Finding(
        Level.OK,
        "base model",
        f"{files} with {len(checkpoint.tensors)} tensors; all {len(linears)} linears"
        " are there in the artifact's shapes",
    )


def _refuse_missing_tensors(checkpoint: Checkpoint) -> None:
    """Refuse files that lack a tensor which the index lists."""
    index = checkpoint.directory / INDEX_NAME
    if not index.is_file():
        return
    listed = read_json(index, CheckpointError, DOWNLOAD_AGAIN)["weight_map"]
    missing = listed.keys() - checkpoint.tensors.keys()
    if missing:
        raise CheckpointError(
            f"{index}: lists {min(missing)}, which no file has ({len(missing)} missing"
            " in all); download the base model again"
        )


def tuned_shapes(directory: Path) -> Iterator[Finding]:
    """Which of the model's fused layers have a launch configuration for this GPU."""
    from vllm.platforms import current_platform

    from vllm_rsparse.bench.layers import layers_of
    from vllm_rsparse.op.tables import Problem
    from vllm_rsparse.op.tuning import device_tables

    if current_platform.device_type != "cuda":
        yield Finding(Level.OK, "tuned shapes", "only the triton backend uses them")
        return
    info = open_artifact(directory).info
    dtype = getattr(torch, info.base.dtype)
    needed = {
        Problem(one.n, one.k, format_of_name(one.format).kind(dtype), one.group)
        for one in layers_of(info, 1)
    }
    device = current_platform.get_device_name()
    tables = device_tables(device)
    tuned = {entry.problem for table in tables for entry in table.entries}
    missing = sorted(needed - tuned, key=lambda problem: (problem.n, problem.k))
    yield Finding(
        Level.WARN if missing else Level.OK,
        "tuned shapes",
        f"{len(needed) - len(missing)} of {len(needed)} at tensor-parallel size 1 on"
        f" {device}"
        + (
            "; defaults are used for "
            + ", ".join(f"{one.n}x{one.k} {one.kind}" for one in missing)
            if missing
            else ""
        ),
    )


def first_layer(directory: Path) -> Iterator[Finding]:
    """The first decoder layer, with the checkpoint's weights if they are available.

    Raises:
        ArtifactError: the checkpoint next to the artifact does not match it.
    """
    opened = open_artifact(directory)
    parsed = {name: LinearName.parse(name) for name in opened.info.linears}
    first = next(iter(parsed.values()))
    layer = (first.path, first.layer)
    names = [name for name, p in parsed.items() if (p.path, p.layer) == layer]
    weights = _weights(directory, opened, names)
    load_time = load_time_format(opened.info.weights)
    layers = [
        FusedLayer(
            group,
            [weights[n] for n in group],
            [opened.read(n) for n in group],
            load_time,
        )
        for group in by_engine_layer(names)
    ]
    origin = "checkpoint's" if (directory / "config.json").is_file() else "random"
    yield _run(layers, f"{first.path}.{first.layer}, {origin} weights")


def synthetic_layer() -> Iterator[Finding]:
    """Random fused layers with factors: enough to check the backend."""
    torch.manual_seed(0)
    k = 256
    shards = []
    for n, rank in ((256, 16), (64, 0), (64, 8)):
        u = torch.randn(n, rank) / rank**0.5 if rank else None
        v = torch.randn(rank, k) / k**0.5 if rank else None
        shards.append(LinearTensors(torch.rand(k) * 1.4, u, v, correction=None))
    weights = [(torch.randn(n, k) / k**0.5).to(torch.bfloat16) for n in (256, 64, 64)]
    yield _run([FusedLayer(["q", "k", "v"], weights, shards)], "random weights")


def _run(layers: list[FusedLayer], what: str) -> Finding:
    from vllm.platforms import current_platform

    from vllm_rsparse import envs

    device = torch.device(current_platform.device_type)
    backend = resolve_backend(envs.backend(), device.type, envs.BACKEND)
    results = [compare(layer, backend, device) for layer in layers]
    name = backend.label
    for layer, result in zip(layers, results, strict=True):
        if not result.equal:
            return Finding(
                Level.FAIL,
                "one layer",
                f"{what}: backend {name} differs from the definition by"
                f" {result.error:.2g} (relative, {', '.join(layer.names)}); rounding"
                f" explains {result.tolerance:g}; serve with"
                " VLLM_RSPARSE_BACKEND=reference and report this",
            )
    return Finding(
        Level.OK,
        "one layer",
        f"{what}: backend {name} equals the definition, relative error"
        f" {max(r.error for r in results):.1g},"
        f" {sum(r.kept for r in results) / len(results):.2f} of the channels kept",
    )


def _weights(directory: Path, opened: Artifact, names: list[str]) -> dict[str, Tensor]:
    """The checkpoint's weights; random ones of the same shapes for a bare artifact."""
    if holds_artifact(directory):
        dtype = getattr(torch, opened.info.dtype)
        shapes = {name: opened.entry(name).shape for name in names}
        return {n: (torch.randn(s) / s[1] ** 0.5).to(dtype) for n, s in shapes.items()}
    checkpoint = PreparedDirectory.open(directory).checkpoint
    weights = LanguageModel(checkpoint).read_weights(names)
    for name, weight in weights.items():
        shape = opened.entry(name).shape
        if tuple(weight.shape) != shape or weight.dtype not in INPUT_DTYPES:
            raise ArtifactError(
                f"{directory}: {name}.weight is {weight.dtype} {list(weight.shape)},"
                f" the artifact expects floats {list(shape)}; it was prepared from"
                " another model: prepare this one"
            )
    return weights
