# SPDX-License-Identifier: Apache-2.0
"""The weights that ``frontier.py`` rounds its reference model to."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from vllm_rsparse.formats.plane_bits import plane_bits
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.linears import find_linears
from vllm_rsparse.testing.quantized import write_plain, write_quantized

GROUP = 128


@dataclass(frozen=True)
class Base:
    """One way to store the weights.

    Attributes:
        bits: read per weight where no channel is skipped, scales included.
        layout: of ``testing.quantized``, for a checkpoint on disk.
        integer_bits: width of the integers that weights are rounded to. They are
            written as bfloat16, because no engine has the format, and measured
            dense only.
        weights: ``prepare --weights``.
    """

    bits: float
    layout: str | None = None
    integer_bits: int | None = None
    weights: str = "as-stored"

    @property
    def in_planes(self) -> bool:
        """Whether ``prepare`` divides bits instead of channels."""
        return self.weights == "int8-planes"

    def directory(self, model: Path, target: Path) -> Path:
        """The base's checkpoint: MODEL itself, or ``target``, written if missing."""
        if self.layout is None and self.integer_bits is None:
            return model
        if not target.exists():
            if self.layout is not None:
                write_quantized(model, target, self.layout)
            elif self.integer_bits is not None:
                _write_rounded(model, target, self.integer_bits)
        return target


BASES = {
    "bf16": Base(16.0),
    "fp8": Base(8.0, "fp8-channel"),
    "int4": Base(4.125, "w4a16-g128"),
    "int4-g64": Base(4.25, "w4a16-g64"),
    "int3": Base(3.125, integer_bits=3),
    "planes": Base(sum(plane_bits(GROUP)), weights="int8-planes"),
}


def _write_rounded(model: Path, target: Path, bits: int) -> None:
    """MODEL with its linears rounded symmetrically, a scale per 128 channels."""
    linears, _ = find_linears(Checkpoint(model))
    tensors = load_file(model / "model.safetensors")
    for linear in linears:
        name = f"{linear.name}.weight"
        tensors[name] = _rounded(tensors[name], bits)
    write_plain(model, target, tensors)


def _rounded(weight: Tensor, bits: int) -> Tensor:
    """[N, K] in its own dtype; codes from -2^(bits-1) to 2^(bits-1) - 1."""
    most = 2 ** (bits - 1)
    groups = weight.float().unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(-1, keepdim=True) / (most - 1)
    codes = (groups / scales.clamp(min=1e-12)).round().clamp(-most, most - 1)
    return (codes * scales).flatten(1).to(weight.dtype)
