# SPDX-License-Identifier: Apache-2.0
"""The end of a streamed model: final norm, output layer, what it does to its logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class OutputHead:
    """From hidden states to logits, of the served model or of the base model.

    The model's own forward computes logits, with its decoder replaced: scaled logits
    (Granite, Cohere) and soft caps (Gemma 2) are included. All is differentiable where
    gradients are enabled.

    Args:
        model: transformers' model.
        norm: its final norm, materialised.
        projection: its output layer, materialised.
        visible: hidden states without what else the layers pass on.
        served: the output layer's weight [vocabulary, hidden] as it is quantized while
            it loads; None: as the checkpoint stores it.

    Attributes:
        weight: of the served model's output layer, [vocabulary, hidden].
    """

    def __init__(
        self,
        model: Any,
        norm: nn.Module,
        projection: nn.Module,
        visible: Callable[[Tensor], Tensor],
        served: Tensor | None,
    ) -> None:
        self._model = model
        self._norm = norm
        self._visible = visible
        self._projection = projection
        stored: Tensor = projection.weight  # type: ignore[assignment]
        self.weight = stored if served is None else served

    def __call__(self, hidden: Tensor) -> Tensor:
        """The served model's logits [tokens, vocabulary] of states [tokens, hidden]."""
        return self.logits(self.states(hidden))

    def states(self, hidden: Tensor) -> Tensor:
        """What the output layer receives: hidden states after the final norm."""
        return self._norm(self._visible(hidden)[None])[0]

    def logits(self, states: Tensor) -> Tensor:
        """The served model's logits of ``states``."""
        with self._served_weight():
            return self.base_logits(states)

    def base_logits(self, states: Tensor) -> Tensor:
        """The base model's logits of ``states``."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        class Output(BaseModelOutputWithPast):
            """Without what some decoders also return (Gemma 4, experts)."""

            def __getattr__(self, name: str) -> None:
                if name.startswith("_"):
                    raise AttributeError(name)

        base = self._model.base_model
        base.forward = lambda *_, **__: Output(last_hidden_state=states[None])
        try:
            return self._model(inputs_embeds=states[None], use_cache=False).logits[0]
        finally:
            del base.forward

    @contextmanager
    def _served_weight(self) -> Iterator[None]:
        if self.weight is self._projection.weight:
            yield
            return

        def forward(x: Tensor) -> Tensor:
            return functional.linear(x, self.weight, self._projection.bias)  # type: ignore[arg-type]

        self._projection.forward = forward  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            del self._projection.forward
