# SPDX-License-Identifier: Apache-2.0
"""All linears, layer by layer: observe, calibrate, write, carry hidden states on."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_rsparse.artifact.schema import LinearEntry
from vllm_rsparse.model.linears import Linear
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.calibration.linear import CalibratedLinear, calibrate_linear
from vllm_rsparse.prepare.calibration.observers import LayerInputs, input_channels
from vllm_rsparse.prepare.calibration.propagate import (
    sparse_linears,
    stage_input,
    stages,
)
from vllm_rsparse.prepare.recipe.planned import Planned
from vllm_rsparse.prepare.store.snapshots import Snapshots
from vllm_rsparse.prepare.store.writer import SafetensorsWriter, TensorSpec

logger = logging.getLogger(__name__)


@dataclass
class Calibrated:
    """JSON entries by name, and by method the largest residual of the factors."""

    entries: dict[str, LinearEntry] = field(default_factory=dict)
    residuals: dict[str, float] = field(default_factory=dict)

    def add(self, entries: dict[str, LinearEntry], residuals: dict[str, float]) -> None:
        """What one layer brought."""
        self.entries |= entries
        for method, residual in residuals.items():
            self.residuals[method] = max(self.residuals.get(method, 0.0), residual)


def calibrate_layers(
    model: StreamedModel,
    linears: Sequence[Linear],
    planned: Planned,
    windows: Tensor,
    path: Path,
    stored_dtype: torch.dtype,
    seed: int,
    snapshots: Snapshots,
) -> Calibrated:
    """Write the artifact's tensors.

    Args:
        model: the streamed base model.
        linears: all linears that take part, layer by layer.
        planned: what each gets.
        windows: int64 [samples, tokens].
        path: safetensors file to create.
        stored_dtype: of the factors.
        seed: of the randomised methods.
        snapshots: keep what was found where sparse activations are calibrated on; dense
            ones take one forward pass, which is not worth it.
    """
    inputs_bytes = input_channels(linears) * windows.numel() * model.dtype.itemsize
    logger.info(
        "calibrating %d linears on %d windows of %d tokens, %s on %s; the inputs of one"
        " layer take %.1f GiB",
        len(linears), *windows.shape, str(model.dtype).removeprefix("torch."),
        model.device, inputs_bytes / 2**30,
    )  # fmt: skip
    layers = [(i, list(group)) for i, group in groupby(linears, lambda one: one.layer)]
    calibrated = Calibrated()
    with (
        SafetensorsWriter(path, _specs(linears, planned, stored_dtype)) as writer,
        tqdm(total=len(linears), desc="prepare", unit="linear") as progress,
    ):
        hidden, done = model.embed(windows), 0
        sparse = planned.recipe.activations == "sparse"
        if sparse and "hidden" in snapshots:
            tensors, done = snapshots.get("hidden")
            hidden = tensors["hidden"].to(model.device)
        for position, (index, members) in enumerate(layers):
            key = f"calibrated.{position}"
            if position < done:
                tensors, note = snapshots.get(key)
                entries = {name: _entry(raw) for name, raw in note["entries"].items()}
                progress.update(len(members))
            else:
                found = _Layer(model, planned, seed, progress)
                run = found.on_sparse if sparse else found.on_dense
                run(index, members, hidden)
                tensors, entries = found.tensors, found.entries
                note = {
                    "entries": {name: asdict(one) for name, one in entries.items()},
                    "residuals": found.residuals,
                }
                if sparse:
                    snapshots.put(key, tensors, note)
                    if snapshots.state_due():
                        snapshots.put("hidden", {"hidden": hidden}, position + 1)
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            calibrated.add(entries, note["residuals"])
    if "randomised" in calibrated.residuals:
        logger.info(
            "randomised SVD: singular pairs are off by at most %.1e, relative",
            calibrated.residuals["randomised"],
        )
    return calibrated


def run_sparse(
    model: StreamedModel,
    linears: Sequence[Linear],
    planned: Planned,
    hidden: Tensor,
    seed: int,
    name: str,
) -> None:
    """Calibrate on sparse activations, and keep nothing but what leaves the last layer.

    Args:
        model: the streamed base model.
        linears: all linears that take part, layer by layer.
        planned: what each gets.
        hidden: [samples, tokens, hidden], embedded windows; replaced.
        seed: of the randomised methods.
        name: what progress is reported as.
    """
    with tqdm(total=len(linears), desc=name, unit="linear", leave=False) as progress:
        for index, members in groupby(linears, lambda one: one.layer):
            layer = _Layer(model, planned, seed, progress)
            layer.on_sparse(index, list(members), hidden)


class _Layer:
    """Calibrates the linears of one layer."""

    def __init__(
        self, model: StreamedModel, planned: Planned, seed: int, progress: tqdm
    ) -> None:
        self._model = model
        self._planned = planned
        self._seed = seed
        self._progress = progress
        self.tensors: dict[str, Tensor] = {}
        self.entries: dict[str, LinearEntry] = {}
        self.residuals: dict[str, float] = {}

    def on_dense(self, index: int, members: Sequence[Linear], hidden: Tensor) -> None:
        """On the dense layer's activations; hidden states go through it."""
        inputs = LayerInputs(members, hidden.shape[0] * hidden.shape[1])
        with self._model.layer(index) as layer, inputs.observe(layer):
            self._model.run_layer(index, hidden)
        for linear in members:
            self._calibrate(linear, inputs[linear.kind])

    def on_sparse(self, index: int, members: Sequence[Linear], hidden: Tensor) -> None:
        """On activations that each linear, once sparse, changes for the later ones."""
        first = self._planned.first
        with self._model.layer(index) as layer, sparse_linears(layer) as sparse:
            for stage in stages(members):
                x = stage_input(self._model, stage[0], layer, hidden, first)
                for linear in stage:
                    result = self._calibrate(linear, x)
                    sparse.install(linear.kind, result.tensors, first)
            self._model.run_layer(index, hidden)

    def _calibrate(self, linear: Linear, x: Tensor) -> CalibratedLinear:
        weight = self._model.checkpoint.read([linear.weight])[linear.weight]
        scale = self._planned.scales.get(linear.name)
        metric = self._planned.metrics.get(linear.name)
        device = self._model.device
        result = calibrate_linear(
            weight.to(device),
            x,
            self._planned.plans[linear.name],
            _seed(self._seed, linear.name),
            None if scale is None else scale.to(device),
            self._planned.recipe.correction,
            None if metric is None else metric.to(device),
        )
        for suffix, tensor in result.tensors.items():
            self.tensors[f"{linear.name}.{suffix}"] = tensor.cpu()
        self.entries[linear.name] = result.entry
        if result.factors is not None:
            method, residual = result.factors.method, result.factors.residual
            self.residuals[method] = max(self.residuals.get(method, 0.0), residual)
        self._progress.update()
        return result


def _entry(raw: dict[str, Any]) -> LinearEntry:
    n, k = raw["shape"]
    return LinearEntry(**{**raw, "shape": (n, k)})


def _specs(
    linears: Sequence[Linear], planned: Planned, dtype: torch.dtype
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


def _seed(seed: int, name: str) -> int:
    """A seed of each linear's own, so that the order of work does not matter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
