# SPDX-License-Identifier: Apache-2.0
"""The one parser of a linear's name.

A linear's name in a checkpoint is the path of the list of decoder layers, the layer's
index, and the linear's name within its layer, which is called its *kind*:
``model.layers.3.self_attn.q_proj`` is the kind ``self_attn.q_proj`` in layer 3 of
``model.layers``. A kind's last word, ``q_proj``, is its *label*.
"""

import re
from dataclasses import dataclass, replace

# Of the output layer in an artifact, whatever the checkpoint calls it.
HEAD = "lm_head"

_NAME = re.compile(
    r"(?:(?P<path>.*?)\.)??(?P<layer>0|[1-9]\d{0,8})\.(?P<kind>.+)", re.ASCII
)


@dataclass(frozen=True)
class LinearName:
    """A parsed name.

    Attributes:
        path: of the list of decoder layers, ``model.layers``; may be empty.
        layer: index of the decoder layer; None for a linear outside the layers.
        kind: name within the layer, ``self_attn.q_proj``; the whole name outside of
            any layer.
    """

    path: str
    layer: int | None
    kind: str

    @classmethod
    def parse(cls, name: str) -> "LinearName":
        """Split a name at its first number; every string is a valid name."""
        match = _NAME.fullmatch(name)
        if match is None:
            return cls("", None, name)
        return cls(match["path"] or "", int(match["layer"]), match["kind"])

    def __str__(self) -> str:
        if self.layer is None:
            return self.kind
        return ".".join(filter(None, (self.path, str(self.layer), self.kind)))

    @property
    def label(self) -> str:
        """The short form of the kind, ``q_proj``."""
        return label_of(self.kind)

    @property
    def in_any_layer(self) -> tuple[str, str]:
        """The part of the name that is the same in all decoder layers."""
        return self.path, self.kind

    def of_kind(self, kind: str) -> "LinearName":
        """Another linear of the same layer."""
        return replace(self, kind=kind)


def label_of(kind: str) -> str:
    """The short form of a kind: ``q_proj`` for ``self_attn.q_proj``."""
    return kind.rpartition(".")[2]
