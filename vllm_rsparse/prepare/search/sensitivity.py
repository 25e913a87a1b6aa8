# SPDX-License-Identifier: Apache-2.0
"""What dropping a channel costs in loss, for all linears on one scale.

Dropping channel j changes a linear's output by -W[:, j] x_j, and the loss, to first
order, by -x_j d_j with d_j = W[:, j] . (gradient of the loss by the output). With
labels drawn from the model itself the mean of d_j is zero and its square is the
diagonal of the Fisher matrix: half of x_j^2 E[d_j^2] is, to second order, the KL
divergence to the dense model. At run time only x_j is known, so the score is |x_j| a_j
with a_j = sqrt(E[d_j^2]), which becomes a threshold per channel like any other. Instead
of the mean square, a_j uses the mean of |d_j|^1.5, to the power 1/1.5, because a few
tokens with large gradients dominate a mean square (KL divergence 2% lower, bundled
model, 60%).

A channel of a linear with N outputs costs N elements to read. Keeping those with

    x_j^2 a_j^2 / N  >  one constant for the whole model

loses least per byte, if errors are independent (``one_threshold``). In q and k they are
not: the dropped contributions add up (in the first q_proj to 3.4 times the sum of the
individual errors), mostly in a few directions of the output, which ``factors`` finds
from E[g g^T].

Streamed layer by layer: the forward pass (``states``) keeps the input of each layer on
disk, the backward pass loads one layer at a time again, last to first.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vllm_rsparse.model.finite import check_activations
from vllm_rsparse.model.linears import Linear
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.calibration.head import served_head
from vllm_rsparse.prepare.calibration.thresholds import row_chunks
from vllm_rsparse.prepare.run import LayerLinears, Run
from vllm_rsparse.prepare.search.states import LayerStates, run_dense
from vllm_rsparse.prepare.store.run_store import Key, RunStore

# Scores are counted by the upper 16 bits of their float32 pattern: 128 bins an octave.
BINS = 1 << 16
# Tokens that are counted; more of them do not change a share noticeably.
COUNTED_TOKENS = 8192
_MOMENT = 1.5


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of one linear.

    Attributes:
        scale: float32 [K] on the CPU, a_j; the score is |x_j| times it.
        counts: int64 [65536], calibration scores / sqrt(N) by upper 16 bits.
        metric: float32 [N, N] on the CPU, E[g g^T]; None where factors do
            not pay.
    """

    scale: Tensor
    counts: Tensor
    metric: Tensor | None = None


@dataclass(frozen=True)
class SensitivityPass:
    """Results of one forward and one backward pass of the dense model.

    Attributes:
        linears: by name.
        states: of the forward pass.
    """

    linears: Mapping[str, Sensitivity]
    states: LayerStates


def sensitivities(run: Run) -> SensitivityPass:
    """One forward and one backward pass of the dense model over the windows.

    The input of each layer, and the results there, are kept in the run's store.

    Raises:
        NotFiniteError: activations, logits or gradients contain NaN or infinity.
    """
    model, store, layers = run.model, run.store, run.layers
    result: dict[str, Sensitivity] = {}
    with tqdm(total=2 * len(layers), desc="sensitivity", unit="layer") as progress:
        hidden, states = run_dense(run, progress)
        gradient, reached = _start(run, hidden)
        del hidden
        for position in range(reached, len(layers)):
            result |= _kept(store, position, layers[position])
        progress.update(len(layers) - reached)
        for position in reversed(range(reached)):
            layer = layers[position]
            with model.layer(layer.index) as module:
                taps = {
                    linear.kind: _Tap(linear, module, run.dense_prefix)
                    for linear in layer
                }
                _backward(model, layer.index, states.entering(position), gradient)
                sensitivity_of = {
                    linear.name: taps[linear.kind].finish(taps[linear.input_group])
                    for linear in layer
                }
            _keep(store, position, sensitivity_of)
            if store.state_due():
                store.put(_GRADIENT, {"gradient": gradient}, position)
            result |= sensitivity_of
            progress.update()
    return SensitivityPass(result, states)


def _sensitivity(position: int) -> Key:
    return Key("sensitivity", position)


_GRADIENT = Key("gradient", "state")


def _start(run: Run, hidden: Tensor) -> tuple[Tensor, int]:
    """Where the backward pass begins: the gradient by a layer's input, and the layer.

    Results of the layers from there on are known; the gradient is unused if all are.
    """
    store = run.store
    if _sensitivity(0) in store:  # the last that is found
        return hidden, 0
    if _GRADIENT in store:
        tensors, reached = store.get(_GRADIENT)
        return tensors["gradient"].to(run.model.device), reached
    gradient = _output_gradient(run, hidden)
    store.put(_GRADIENT, {"gradient": gradient}, len(run.layers))
    return gradient, len(run.layers)


def _keep(
    store: RunStore, position: int, sensitivity_of: Mapping[str, Sensitivity]
) -> None:
    tensors = {}
    for name, sensitivity in sensitivity_of.items():
        tensors[f"{name}.scale"] = sensitivity.scale
        tensors[f"{name}.counts"] = sensitivity.counts
        if sensitivity.metric is not None:
            tensors[f"{name}.metric"] = sensitivity.metric
    store.put(_sensitivity(position), tensors)


def _kept(
    store: RunStore, position: int, layer: LayerLinears
) -> dict[str, Sensitivity]:
    tensors, _ = store.get(_sensitivity(position))
    return {
        linear.name: Sensitivity(
            tensors[f"{linear.name}.scale"],
            tensors[f"{linear.name}.counts"],
            tensors.get(f"{linear.name}.metric"),
        )
        for linear in layer
    }


class _Tap:
    """Sums of |d_j|^1.5 of one linear, and its inputs where it is their source."""

    def __init__(self, linear: Linear, layer: nn.Module, dense_prefix: int) -> None:
        self._name = linear.name
        self._outputs = linear.shape[0]
        self._dense_prefix = dense_prefix
        self._source = linear.kind == linear.input_group
        module = layer.get_submodule(linear.kind)
        self._weight: Tensor = module.weight  # type: ignore[assignment]
        self._sums: Tensor | float = 0.0
        self._metric: Tensor | None = None
        if linear.factors_pay:
            self._metric = torch.zeros(
                linear.shape[0], linear.shape[0], device=self._weight.device
            )
        self._tokens = 0
        self._inputs: list[Tensor] = []
        self._handle = module.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if self._source:
            x = args[0].detach()[:, self._dense_prefix :]
            self._inputs.append(x.reshape(-1, x.shape[-1]))
        out.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        counted = gradient[:, self._dense_prefix :].reshape(-1, gradient.shape[-1])
        d = counted @ self._weight
        self._sums = self._sums + d.float().abs_().pow_(_MOMENT).sum(0)
        if self._metric is not None:
            g = counted.float()
            self._metric.addmm_(g.mT, g)
        self._tokens += len(d)

    def finish(self, source: "_Tap") -> Sensitivity:
        """The result; ``source`` is the tap that holds this linear's inputs."""
        self._handle.remove()
        if not isinstance(self._sums, Tensor):
            raise RuntimeError("backward did not reach the linear")
        scale = (self._sums / self._tokens).pow_(1 / _MOMENT)
        check_activations(scale, f"the gradients at {self._name}")
        counts = torch.zeros(BINS, dtype=torch.int64, device=scale.device)
        step = max(1, self._tokens // COUNTED_TOKENS)
        for x in source._inputs:
            for rows in row_chunks(x[::step]):
                score = rows.float().abs_() * (scale / self._outputs**0.5)
                bins = (score.view(torch.int32) >> 16).flatten()
                counts += torch.bincount(bins, minlength=BINS)
        metric = self._metric
        if metric is not None:
            metric = (metric / self._tokens).cpu()
        return Sensitivity(scale.cpu(), counts.cpu(), metric)


def _backward(
    model: StreamedModel, index: int, entering: Tensor, gradient: Tensor
) -> None:
    """Replace the gradient by the layer's output with that by its input, in place."""
    with torch.enable_grad():
        for windows in model.batches(entering):
            h = entering[windows].to(model.device).requires_grad_()
            out = model.call_layer(index, h, windows)
            (by_input,) = torch.autograd.grad(out, h, gradient[windows])
            gradient[windows] = by_input


def _output_gradient(run: Run, hidden: Tensor) -> Tensor:
    """Gradient of the summed loss by the last layer's output, labels drawn from it.

    The output layer is the one that will be served.
    """
    gradient = torch.zeros_like(hidden)
    generator = torch.Generator(device=hidden.device).manual_seed(run.seed)
    dense_prefix = run.dense_prefix
    with served_head(run) as head, torch.enable_grad():
        head.calibrate(hidden[:, dense_prefix:].flatten(0, 1))
        for row in range(len(hidden)):
            h = hidden[row, dense_prefix:].detach().clone().requires_grad_()
            logits = head(h)
            check_activations(logits, "the logits")
            logs = logits.float().log_softmax(-1)
            labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            loss = -logs.gather(-1, labels).sum()
            (gradient[row, dense_prefix:],) = torch.autograd.grad(loss, h)
    return gradient
