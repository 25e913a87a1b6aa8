# SPDX-License-Identifier: Apache-2.0
"""The linears of one decoder layer: observe and calibrate."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from vllm_rsparse.artifact.schema import LinearEntry
from vllm_rsparse.artifact.tensors import LinearTensors
from vllm_rsparse.model.linears import Linear
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.calibration.linear import (
    CPU_ERROR_TOKENS,
    ERROR_TOKENS,
    calibrate_linear,
)
from vllm_rsparse.prepare.calibration.observers import LayerInputs
from vllm_rsparse.prepare.calibration.propagate import (
    sparse_linears,
    stage_input,
    stages,
)
from vllm_rsparse.prepare.calibration.replay import replaying
from vllm_rsparse.prepare.recipe.planned import Planned
from vllm_rsparse.prepare.run import LayerLinears, Run


@dataclass
class LayerResult:
    """What calibration finds in one layer.

    Attributes:
        tensors: of the artifact by name, on the CPU.
        entries: JSON entries by name of linear.
        residuals: by method, the largest residual of the factors.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    entries: dict[str, LinearEntry] = field(default_factory=dict)
    residuals: dict[str, float] = field(default_factory=dict)

    @property
    def note(self) -> dict[str, Any]:
        """All but the tensors, as JSON."""
        entries = {name: asdict(entry) for name, entry in self.entries.items()}
        return {"entries": entries, "residuals": self.residuals}

    @classmethod
    def of_note(
        cls, tensors: dict[str, Tensor], note: Mapping[str, Any]
    ) -> "LayerResult":
        """The result that ``note`` was taken of."""
        entries = {name: _entry(raw) for name, raw in note["entries"].items()}
        return cls(tensors, entries, note["residuals"])


@dataclass(frozen=True, eq=False)
class Installed:
    """What a linear needs to run sparse.

    Attributes:
        tensors: of the artifact, on the device.
        first: what the first of two planes of the weight stands for, [N, K]; None where
            it is read whole.
    """

    tensors: LinearTensors
    first: Tensor | None


class LayerCalibration:
    """Calibrates the linears of one layer.

    Args:
        run: the model and its calibration text.
        planned: the plan of each linear.
        progress: counts linears.
        measured: whether errors are measured and results kept; without, the linears are
            only ``installed``.

    Attributes:
        result: what it found.
        installed: the same on the device, by kind of linear.
    """

    def __init__(
        self,
        run: Run,
        planned: Planned,
        progress: tqdm,
        measured: bool = True,
    ) -> None:
        self._run = run
        on_cpu = run.model.device.type == "cpu"
        tokens = CPU_ERROR_TOKENS if on_cpu else ERROR_TOKENS
        self._error_tokens = tokens if measured else 0
        self._planned = planned
        self._progress = progress
        self.result = LayerResult()
        self.installed: dict[str, Installed] = {}

    def on_dense(self, layer: LayerLinears, module: nn.Module, hidden: Tensor) -> None:
        """Use activations of the dense layer; hidden states pass through it.

        Args:
            layer: its linears.
            module: the layer, materialised.
            hidden: [samples, tokens, hidden], replaced by the layer's output.
        """
        inputs = LayerInputs(layer, hidden.shape[0] * hidden.shape[1])
        with inputs.observe(module):
            self._run.model.run_layer(layer.index, hidden)
        for linear in layer:
            planes = planes_of(self._run.model, linear)
            self.calibrate(linear, inputs.of(linear), planes)

    def on_sparse(self, layer: LayerLinears, module: nn.Module, hidden: Tensor) -> None:
        """Use activations that each linear, once sparse, changes for the later ones.

        Arguments are those of ``on_dense``; hidden states pass through the sparse
        layer.
        """
        model, prefix = self._run.model, self._run.dense_prefix
        *earlier, last = stages(layer)
        kept = [linear for stage in earlier for linear in stage]
        tokens = hidden.shape[0] * hidden.shape[1]
        with (
            sparse_linears(module) as sparse,
            replaying(model, module, kept, tokens) as replay,
        ):
            for stage in (*earlier, last):
                x = stage_input(model, stage[0], module, hidden, prefix)
                for linear in stage:
                    planes = planes_of(model, linear)
                    installed = self.calibrate(linear, x, planes)
                    sparse.install(
                        linear.kind, installed.tensors, prefix, installed.first
                    )
                    if stage is not last:
                        replay.settle(linear)
            model.run_layer(layer.index, hidden)

    def calibrate(
        self, linear: Linear, x: Tensor, planes: Sequence[Tensor]
    ) -> Installed:
        """One linear, on its inputs [tokens, K]."""
        planned, device = self._planned, self._run.model.device
        scale = planned.scales.get(linear.name)
        metric = planned.metrics.get(linear.name)
        result = calibrate_linear(
            planes,
            x,
            planned.plans[linear.name],
            _seed(self._run.seed, linear.name),
            None if scale is None else scale.to(device),
            planned.corrected,
            None if metric is None else metric.to(device),
            self._error_tokens,
        )
        if result.entry is not None:
            for name, tensor in result.tensors.named(linear.name).items():
                self.result.tensors[name] = tensor.cpu()
            self.result.entries[linear.name] = result.entry
        if result.factors is not None:
            method, residual = result.factors.method, result.factors.residual
            residuals = self.result.residuals
            residuals[method] = max(residuals.get(method, 0.0), residual)
        self._progress.update()
        first = planes[0] if len(planes) > 1 else None
        self.installed[linear.kind] = Installed(result.tensors, first)
        return self.installed[linear.kind]


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
            calibration = LayerCalibration(run, planned, progress, measured=False)
            with run.model.layer(layer.index) as module:
                calibration.on_sparse(layer, module, hidden)
    return hidden


def planes_of(model: StreamedModel, linear: Linear) -> list[Tensor]:
    """What each plane of a linear's weight stands for, on the model's device."""
    return [plane.to(model.device) for plane in model.planes(linear)]


def _entry(raw: dict[str, Any]) -> LinearEntry:
    n, k = raw["shape"]
    return LinearEntry(**{**raw, "shape": (n, k)})


def _seed(seed: int, name: str) -> int:
    """A separate seed per linear, so that the order of work does not matter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
