# SPDX-License-Identifier: Apache-2.0
"""What dropping a channel costs in loss, for all linears on one scale.

Dropping channel j changes a linear's output by -W[:, j] x_j, and the loss, to first
order, by -x_j d_j with d_j = W[:, j] . (gradient of the loss by the output). With
labels drawn from the model itself the mean of d_j is zero and its square is the
diagonal of the Fisher matrix: half of x_j^2 E[d_j^2] is, to second order, the KL
divergence to the dense model. At run time only x_j is known, so the score is |x_j| a_j
with a_j = sqrt(E[d_j^2]): a threshold per channel as any other. In place of the mean
square a_j is the mean of |d_j|^1.5, to the power 1/1.5: a few tokens of large gradient
make most of a mean square (KL divergence 2% lower, reference model, 60%).

A channel of a linear with N outputs costs N elements to read. Keeping those with

    x_j^2 a_j^2 / N  >  one constant for the whole model

is the cheapest way to lose little, if errors add up independently; this shares the
sparsity out between layers and kinds without a search. In q and k they do not: what
is dropped there adds up (in the first q_proj to 3.4 times the sum of its parts), mostly
in a few directions of the output, which ``search_factors`` finds from E[g g^T].

Streamed as ``prepare`` is: the forward pass keeps what enters each layer on disk, the
backward pass loads one layer at a time again, last to first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vllm_rsparse.model.linears import Linear
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.calibration.thresholds import row_chunks
from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.store.snapshots import Snapshots

# Scores are counted by the upper 16 bits of their float32 pattern: 128 bins an octave.
_BINS = 1 << 16
_MOMENT = 1.5


@dataclass(frozen=True)
class Sensitivity:
    """Of one linear.

    Attributes:
        scale: float32 [K] on the CPU, a_j; times |x_j| it is the score.
        counts: int64 [65536], calibration scores / sqrt(N) by upper 16 bits.
        metric: float32 [N, N] on the CPU, E[g g^T]; None where
            factors do not pay.
    """

    scale: Tensor
    counts: Tensor
    metric: Tensor | None = None


def sensitivities(
    model: StreamedModel,
    linears: Sequence[Linear],
    windows: Tensor,
    first: int,
    seed: int,
    snapshots: Snapshots,
) -> dict[str, Sensitivity]:
    """One forward and one backward pass of the dense model over the windows.

    Args:
        model: the streamed base model.
        linears: all linears that take part, layer by layer.
        windows: int64 [samples, tokens].
        first: leading positions of each window that stay dense and do not count.
        seed: draws the labels.
        snapshots: keep what was found, by position in the order of the layers, and
            ``entering.0``, ...: hidden states [samples, tokens, hidden].
    """
    layers = [(i, list(group)) for i, group in groupby(linears, lambda one: one.layer)]
    result: dict[str, Sensitivity] = {}
    with tqdm(total=2 * len(layers), desc="sensitivity", unit="layer") as progress:
        hidden = _forward(model, layers, windows, snapshots, progress)
        gradient, reached = _start(model, hidden, len(layers), first, seed, snapshots)
        del hidden
        for position in range(reached, len(layers)):
            result |= _kept(snapshots, position, layers[position][1])
        progress.update(len(layers) - reached)
        for position in reversed(range(reached)):
            index, members = layers[position]
            entering = snapshots.get(f"entering.{position}")[0]["hidden"]
            with model.layer(index) as layer:
                taps = {linear.kind: _Tap(linear, layer, first) for linear in members}
                _backward(model, index, entering, gradient)
                found = {
                    one.name: taps[one.kind].finish(taps[one.input_group])
                    for one in members
                }
            _keep(snapshots, position, found)
            if snapshots.state_due():
                snapshots.put("gradient", {"gradient": gradient}, position)
            result |= found
            progress.update()
    return result


def _start(
    model: StreamedModel,
    hidden: Tensor,
    layers: int,
    first: int,
    seed: int,
    snapshots: Snapshots,
) -> tuple[Tensor, int]:
    """Where the backward pass begins: the gradient by what enters a layer, and which.

    Layers from there on are known; the gradient means nothing where all are.
    """
    if "sensitivity.0" in snapshots:  # the last that is found
        return hidden, 0
    if "gradient" in snapshots:
        tensors, reached = snapshots.get("gradient")
        return tensors["gradient"].to(model.device), reached
    gradient = _output_gradient(model, hidden, first, seed)
    snapshots.put("gradient", {"gradient": gradient}, layers)
    return gradient, layers


def _forward(
    model: StreamedModel,
    layers: Sequence[tuple[int, Sequence[Linear]]],
    windows: Tensor,
    snapshots: Snapshots,
    progress: tqdm,
) -> Tensor:
    """Keep what enters each layer; returns what leaves the last."""
    hidden = model.embed(windows)  # also records what the layers are called with
    snapshots.require((len(layers) + 1) * hidden.nbytes)
    done = 0
    while done < len(layers) and f"entering.{done + 1}" in snapshots:
        done += 1
    if done > 0:
        hidden = snapshots.get(f"entering.{done}")[0]["hidden"].to(model.device)
    else:
        snapshots.put("entering.0", {"hidden": hidden})
    progress.update(done)
    for position in range(done, len(layers)):
        index = layers[position][0]
        with model.layer(index):
            model.run_layer(index, hidden)
        snapshots.put(f"entering.{position + 1}", {"hidden": hidden})
        progress.update()
    return hidden


def _keep(
    snapshots: Snapshots, position: int, found: Mapping[str, Sensitivity]
) -> None:
    tensors = {}
    for name, one in found.items():
        tensors[f"{name}.scale"] = one.scale
        tensors[f"{name}.counts"] = one.counts
        if one.metric is not None:
            tensors[f"{name}.metric"] = one.metric
    snapshots.put(f"sensitivity.{position}", tensors)


def _kept(
    snapshots: Snapshots, position: int, members: Sequence[Linear]
) -> dict[str, Sensitivity]:
    tensors, _ = snapshots.get(f"sensitivity.{position}")
    return {
        one.name: Sensitivity(
            tensors[f"{one.name}.scale"],
            tensors[f"{one.name}.counts"],
            tensors.get(f"{one.name}.metric"),
        )
        for one in members
    }


def share_out(
    linears: Sequence[Linear], found: Mapping[str, Sensitivity], sparsity: float
) -> dict[str, LinearPlan]:
    """Plans with one threshold on score / sqrt(N) for the whole model; no factors.

    The fraction of the bin that the threshold falls into is chosen so that the plans
    add up to ``sparsity`` exactly.
    """
    fractions = torch.stack(
        [
            found[one.name].counts.double() / found[one.name].counts.sum()
            for one in linears
        ]
    )
    elements = torch.tensor([float(n * k) for n, k in (one.shape for one in linears)])
    weights = elements.double() / elements.sum()
    dropped = (weights @ fractions).cumsum(0)
    edge = min(int(torch.searchsorted(dropped, sparsity)), _BINS - 1)
    inside = float(weights @ fractions[:, edge])
    below = float(dropped[edge]) - inside
    part = min(max((sparsity - below) / inside, 0.0), 1.0) if inside > 0 else 0.0
    shares = fractions[:, :edge].sum(1) + part * fractions[:, edge]
    return {
        linear.name: LinearPlan(min(max(share, 0.0), 1.0), 1.0)
        for linear, share in zip(linears, shares.tolist(), strict=True)
    }


class _Tap:
    """Sums of |d_j|^1.5 of one linear, and its inputs where it is their source."""

    def __init__(self, linear: Linear, layer: nn.Module, first: int) -> None:
        self._outputs = linear.shape[0]
        self._first = first
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
            x = args[0].detach()[:, self._first :]
            self._inputs.append(x.reshape(-1, x.shape[-1]))
        out.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        counted = gradient[:, self._first :].reshape(-1, gradient.shape[-1])
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
        counts = torch.zeros(_BINS, dtype=torch.int64, device=scale.device)
        for x in source._inputs:
            for rows in row_chunks(x):
                score = rows.float().abs_() * (scale / self._outputs**0.5)
                bins = (score.view(torch.int32) >> 16).flatten()
                counts += torch.bincount(bins, minlength=_BINS)
        metric = self._metric
        if metric is not None:
            metric = (metric / self._tokens).cpu()
        return Sensitivity(scale.cpu(), counts.cpu(), metric)


def _backward(
    model: StreamedModel, index: int, entering: Tensor, gradient: Tensor
) -> None:
    """Replace the gradient by the layer's output with that by its input, in place."""
    with torch.enable_grad():
        for row in range(len(entering)):
            h = entering[row : row + 1].to(model.device).requires_grad_()
            out = model.call_layer(index, h)
            (gradient[row : row + 1],) = torch.autograd.grad(
                out, h, gradient[row : row + 1]
            )


def _output_gradient(
    model: StreamedModel, hidden: Tensor, first: int, seed: int
) -> Tensor:
    """Gradient of the summed loss by the last layer's output, labels drawn from it."""
    gradient = torch.zeros_like(hidden)
    generator = torch.Generator(device=hidden.device).manual_seed(seed)
    with model.head() as head, torch.enable_grad():
        for row in range(len(hidden)):
            h = hidden[row, first:].detach().clone().requires_grad_()
            logs = head(h).float().log_softmax(-1)
            labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            loss = -logs.gather(-1, labels).sum()
            (gradient[row, first:],) = torch.autograd.grad(loss, h)
    return gradient
