# SPDX-License-Identifier: Apache-2.0
"""All linears, layer by layer: observe, calibrate, write, pass hidden states on."""

import hashlib
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_rsparse.artifact.schema import LinearEntry
from vllm_rsparse.artifact.tensors import LinearTensors, scales_name
from vllm_rsparse.model.linears import Linear
from vllm_rsparse.prepare.calibration.linear import (
    ERROR_TOKENS,
    CalibratedLinear,
    calibrate_linear,
)
from vllm_rsparse.prepare.calibration.observers import LayerInputs, input_channels
from vllm_rsparse.prepare.calibration.propagate import (
    sparse_linears,
    stage_input,
    stages,
)
from vllm_rsparse.prepare.recipe.planned import Planned
from vllm_rsparse.prepare.run import LayerLinears, Run
from vllm_rsparse.prepare.store.run_store import Key
from vllm_rsparse.prepare.store.writer import SafetensorsWriter, TensorSpec

logger = logging.getLogger(__name__)

_CALIBRATED = "calibrated"
_HIDDEN = Key("hidden", "state")


@dataclass
class Calibrated:
    """JSON entries by name, and by method the largest residual of the factors."""

    entries: dict[str, LinearEntry] = field(default_factory=dict)
    residuals: dict[str, float] = field(default_factory=dict)

    def add(self, entries: dict[str, LinearEntry], residuals: dict[str, float]) -> None:
        """Add the results of one layer."""
        self.entries |= entries
        for method, residual in residuals.items():
            self.residuals[method] = max(self.residuals.get(method, 0.0), residual)


def calibrate_layers(
    run: Run, planned: Planned, path: Path, stored_dtype: torch.dtype
) -> Calibrated:
    """Write the artifact's tensors.

    Results are kept in the run's store if calibration uses sparse activations; dense
    ones take a single forward pass, for which this is not worthwhile.

    Args:
        run: the model and its calibration text.
        planned: the plan of each linear.
        path: safetensors file to create.
        stored_dtype: of the factors.
    """
    model, store = run.model, run.store
    samples, tokens = run.windows.shape
    inputs = input_channels(run.linears) * run.windows.numel() * model.dtype.itemsize
    logger.info(
        "calibrating %d linears on %d windows of %d tokens, %s on %s; the inputs of one"
        " layer take %.1f GiB",
        len(run.linears),
        samples,
        tokens,
        str(model.dtype).removeprefix("torch."),
        model.device,
        inputs / 2**30,
    )
    calibrated = Calibrated()
    with (
        SafetensorsWriter(path, _specs(run, planned, stored_dtype)) as writer,
        tqdm(total=len(run.linears), desc="prepare", unit="linear") as progress,
    ):
        hidden, done = model.embed(run.windows), 0
        sparse = planned.recipe.activations == "sparse"
        if sparse and _HIDDEN in store:
            tensors, done = store.get(_HIDDEN)
            hidden = tensors["hidden"].to(model.device)
        for position, layer in enumerate(run.layers):
            key = Key(_CALIBRATED, position)
            if position < done:
                tensors, note = store.get(key)
                entries = {name: _entry(raw) for name, raw in note["entries"].items()}
                residuals = note["residuals"]
                progress.update(len(layer))
            else:
                calibration = _LayerCalibration(run, planned, progress)
                if sparse:
                    calibration.on_sparse(layer, hidden)
                else:
                    calibration.on_dense(layer, hidden)
                tensors, entries = calibration.tensors, calibration.entries
                residuals = calibration.residuals
                if sparse:
                    raw = {name: asdict(entry) for name, entry in entries.items()}
                    store.put(key, tensors, {"entries": raw, "residuals": residuals})
                    if store.state_due():
                        store.put(_HIDDEN, {"hidden": hidden}, position + 1)
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            for linear in layer:
                scales = model.scales(linear)
                if scales is not None:
                    writer.write(scales_name(linear.name), scales)
            calibrated.add(entries, residuals)
    if "randomised" in calibrated.residuals:
        logger.info(
            "randomised SVD: singular pairs are off by at most %.1e, relative",
            calibrated.residuals["randomised"],
        )
    return calibrated


def run_sparse(run: Run, planned: Planned, label: str) -> Tensor:
    """Calibrate on sparse activations, and keep only the output of the last layer.

    Args:
        run: the model and the text to calibrate on.
        planned: the plan of each linear.
        label: label of the progress bar.

    Returns:
        [samples, tokens, hidden] in the compute dtype, on the device.
    """
    hidden = run.model.embed(run.windows)
    with tqdm(
        total=len(run.linears), desc=label, unit="linear", leave=False
    ) as progress:
        for layer in run.layers:
            calibration = _LayerCalibration(run, planned, progress, error_tokens=0)
            calibration.on_sparse(layer, hidden)
    return hidden


class _LayerCalibration:
    """Calibrates the linears of one layer."""

    def __init__(
        self,
        run: Run,
        planned: Planned,
        progress: tqdm,
        error_tokens: int = ERROR_TOKENS,
    ) -> None:
        self._run = run
        self._error_tokens = error_tokens
        self._planned = planned
        self._progress = progress
        self.tensors: dict[str, Tensor] = {}
        self.entries: dict[str, LinearEntry] = {}
        self.residuals: dict[str, float] = {}
        # Of the linear that was calibrated last.
        self._planes: list[Tensor] = []

    def on_dense(self, layer: LayerLinears, hidden: Tensor) -> None:
        """Use the dense layer's activations; hidden states pass through it."""
        model = self._run.model
        inputs = LayerInputs(layer, hidden.shape[0] * hidden.shape[1])
        with model.layer(layer.index) as module:
            with inputs.observe(module):
                model.run_layer(layer.index, hidden)
            for linear in layer:
                self._calibrate(linear, inputs.of(linear))

    def on_sparse(self, layer: LayerLinears, hidden: Tensor) -> None:
        """Use activations that each linear, once sparse, changes for the later ones."""
        model, prefix = self._run.model, self._run.dense_prefix
        with model.layer(layer.index) as module, sparse_linears(module) as sparse:
            for stage in stages(layer):
                x = stage_input(model, stage[0], module, hidden, prefix)
                for linear in stage:
                    result = self._calibrate(linear, x)
                    first = self._planes[0] if len(self._planes) > 1 else None
                    sparse.install(linear.kind, result.tensors, prefix, first)
            model.run_layer(layer.index, hidden)

    def _calibrate(self, linear: Linear, x: Tensor) -> CalibratedLinear:
        model = self._run.model
        self._planes = [plane.to(model.device) for plane in model.planes(linear)]
        scale = self._planned.scales.get(linear.name)
        metric = self._planned.metrics.get(linear.name)
        device = model.device
        result = calibrate_linear(
            self._planes,
            x,
            self._planned.plans[linear.name],
            _seed(self._run.seed, linear.name),
            None if scale is None else scale.to(device),
            self._planned.corrected,
            None if metric is None else metric.to(device),
            self._error_tokens,
        )
        for name, tensor in result.tensors.named(linear.name).items():
            self.tensors[name] = tensor.cpu()
        self.entries[linear.name] = result.entry
        if result.factors is not None:
            method, residual = result.factors.method, result.factors.residual
            self.residuals[method] = max(self.residuals.get(method, 0.0), residual)
        self._progress.update()
        return result


def _entry(raw: dict[str, Any]) -> LinearEntry:
    n, k = raw["shape"]
    return LinearEntry(**{**raw, "shape": (n, k)})


def _specs(run: Run, planned: Planned, dtype: torch.dtype) -> dict[str, TensorSpec]:
    specs = {}
    load_time = run.model.load_time
    for linear in run.linears:
        n, k = linear.shape
        rank = planned.plans[linear.name].rank(linear.shape)
        rows = () if run.model.plane_count == 1 else (run.model.plane_count,)
        with torch.device("meta"):
            tensors = LinearTensors(
                torch.empty(*rows, k),
                torch.empty(n, rank, dtype=dtype) if rank > 0 else None,
                torch.empty(rank, k, dtype=dtype) if rank > 0 else None,
                torch.empty(n) if planned.corrected else None,
            )
        for name, tensor in tensors.named(linear.name).items():
            specs[name] = TensorSpec(tuple(tensor.shape), tensor.dtype)
        if load_time is not None and load_time.artifact_scales:
            specs[scales_name(linear.name)] = TensorSpec((n,), torch.float32)
    return specs


def _seed(seed: int, name: str) -> int:
    """A separate seed per linear, so that the order of work does not matter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
