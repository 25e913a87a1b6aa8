# SPDX-License-Identifier: Apache-2.0
"""All linears, layer by layer: calibrate, write, pass hidden states on."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from vllm_rsparse.artifact.schema import LinearEntry
from vllm_rsparse.artifact.tensors import LinearTensors, scales_name
from vllm_rsparse.model.names import HEAD
from vllm_rsparse.prepare.calibration.head import CalibratedHead, calibrate_head
from vllm_rsparse.prepare.calibration.layer import (
    LayerCalibration,
    LayerResult,
    planes_of,
)
from vllm_rsparse.prepare.calibration.observers import LayerInputs, input_channels
from vllm_rsparse.prepare.recipe.planned import Planned
from vllm_rsparse.prepare.run import LayerLinears, Run
from vllm_rsparse.prepare.store.writer import SafetensorsWriter, TensorSpec
from vllm_rsparse.text_table import counted, size_of

logger = logging.getLogger(__name__)


@dataclass
class Calibrated:
    """What the artifact holds besides tensors.

    Attributes:
        entries: JSON entries by name.
        residuals: by method, the largest residual of the factors.
        head: the output layer, where it is not the base model's.
    """

    entries: dict[str, LinearEntry] = field(default_factory=dict)
    residuals: dict[str, float] = field(default_factory=dict)
    head: CalibratedHead | None = None

    def add(self, result: LayerResult) -> None:
        """Add the results of one layer."""
        self.entries |= result.entries
        for method, residual in result.residuals.items():
            self.residuals[method] = max(self.residuals.get(method, 0.0), residual)

    def report(self) -> None:
        """Log how exact the factors are, where that is not obvious."""
        if "randomised" in self.residuals:
            logger.info(
                "randomised SVD: singular pairs are off by at most %.1e, relative",
                self.residuals["randomised"],
            )


@dataclass(frozen=True, eq=False)
class Job:
    """One artifact to calibrate.

    Attributes:
        run: the model and its calibration text.
        sparsity: of the artifact.
        planned: the plan of each linear.
        path: safetensors file to create.
    """

    run: Run
    sparsity: float
    planned: Planned
    path: Path


def calibrate_layers(
    jobs: Sequence[Job], stored_dtype: torch.dtype
) -> list[Calibrated]:
    """Write the tensors of artifacts that one recipe gives at several sparsities.

    Recipes that calibrate on dense activations take one forward pass for all of them.
    On sparse activations each has its own, and the results of its layers are kept in
    the run's store; for a single dense pass this is not worthwhile.

    Args:
        jobs: at least one; they share model, text and recipe.
        stored_dtype: of the factors.
    """
    run = jobs[0].run
    samples, tokens = run.windows.shape
    size = run.windows.numel() * run.model.dtype.itemsize
    logger.info(
        "calibrating %s on %s of %d tokens, %s on %s; the inputs of one layer take %s",
        counted(len(run.linears), "linear"),
        counted(samples, "window"),
        tokens,
        str(run.model.dtype).removeprefix("torch."),
        run.model.device,
        size_of(input_channels(run.linears) * size),
    )
    with (
        ExitStack() as stack,
        tqdm(
            total=len(run.linears) * len(jobs), desc="prepare", unit="linear"
        ) as progress,
    ):
        artifacts = [_Artifact(job, stored_dtype, stack) for job in jobs]
        if jobs[0].planned.recipe.activations == "sparse":
            for artifact in artifacts:
                artifact.calibrate_on_sparse(progress)
        else:
            _calibrate_on_dense(run, artifacts, progress)
    for artifact in artifacts:
        artifact.calibrated.report()
    return [artifact.calibrated for artifact in artifacts]


def _calibrate_on_dense(
    run: Run, artifacts: Sequence["_Artifact"], progress: tqdm
) -> None:
    hidden = run.model.embed(run.windows)
    for layer in run.layers:
        calibrations = [
            LayerCalibration(run, artifact.job.planned, progress)
            for artifact in artifacts
        ]
        inputs = LayerInputs(layer, hidden.shape[0] * hidden.shape[1])
        with run.model.layer(layer.index) as module:
            with inputs.observe(module):
                run.model.run_layer(layer.index, hidden)
            for linear in layer:
                x, planes = inputs.of(linear), planes_of(run.model, linear)
                for calibration in calibrations:
                    calibration.calibrate(linear, x, planes)
        for artifact, calibration in zip(artifacts, calibrations, strict=True):
            artifact.write(layer, calibration.result)
    head = calibrate_head(run, hidden)
    for artifact in artifacts:
        artifact.write_head(head)


class _Artifact:
    """Tensors of one artifact while they are calibrated and written.

    Args:
        job: what to write.
        stored_dtype: of the factors.
        stack: closes the file.
    """

    def __init__(self, job: Job, stored_dtype: torch.dtype, stack: ExitStack) -> None:
        self.job = job
        self.calibrated = Calibrated()
        specs = _specs(job.run, job.planned, stored_dtype)
        self._writer = stack.enter_context(SafetensorsWriter(job.path, specs))

    def calibrate_on_sparse(self, progress: tqdm) -> None:
        """All layers, or those that an interrupted run has not calibrated."""
        run = self.job.run.at(self.job.sparsity)
        store, model = run.store, run.model
        hidden, done = model.embed(run.windows), 0
        state = run.key("hidden", "state")
        if state in store:
            tensors, done = store.get(state)
            hidden = tensors["hidden"].to(model.device)
        for position, layer in enumerate(run.layers):
            key = run.key("calibrated", position)
            if position < done:
                result = LayerResult.of_note(*store.get(key))
                progress.update(len(layer))
            else:
                calibration = LayerCalibration(run, self.job.planned, progress)
                with model.layer(layer.index) as module:
                    calibration.on_sparse(layer, module, hidden)
                result = calibration.result
                store.put(key, result.tensors, result.note)
                if store.state_due():
                    store.put(state, {"hidden": hidden}, position + 1)
            self.write(layer, result)
        self.write_head(calibrate_head(run, hidden))

    def write(self, layer: LayerLinears, result: LayerResult) -> None:
        """Write the results of a layer."""
        for name, tensor in result.tensors.items():
            self._writer.write(name, tensor)
        for linear in layer:
            scales = self.job.run.model.scales(linear)
            if scales is not None:
                self._writer.write(scales_name(linear.name), scales)
        self.calibrated.add(result)

    def write_head(self, head: CalibratedHead | None) -> None:
        """Write what was found of the output layer."""
        self.calibrated.head = head
        if head is not None and head.thresholds is not None:
            for name, tensor in LinearTensors(head.thresholds).named(HEAD).items():
                self._writer.write(name, tensor)


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
    if run.head_sparsity > 0:
        channels = run.model.config["hidden_size"]
        specs[f"{HEAD}.thresholds"] = TensorSpec((channels,), torch.float32)
    return specs
