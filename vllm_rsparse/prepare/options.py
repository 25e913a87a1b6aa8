# SPDX-License-Identifier: Apache-2.0
"""What the user asks of ``prepare``, validated before any work is done."""

import math
from dataclasses import dataclass
from pathlib import Path

from vllm_rsparse.errors import PrepareError
from vllm_rsparse.formats.names import (
    AS_STORED,
    DENSE_HEAD_FORMATS,
    HEAD_FORMATS,
    LOAD_TIME_FORMATS,
)
from vllm_rsparse.texts.documents import TextFile

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = (AS_STORED, *LOAD_TIME_FORMATS)
HEADS = (AS_STORED, *HEAD_FORMATS)
DEFAULT_TOKENS = 4096
# The format whose channels are read with 8, 4 or 0 bits.
IN_PLANES = "int8-planes"
# Held-out tokens that --max-kl is measured on, at most about; see ``held_out``.
HELD_OUT_TOKENS = 8192
MIN_BITS, MAX_BITS = 1.0, 8.0


@dataclass(frozen=True)
class PrepareOptions:
    """Settings of one run.

    Attributes:
        model: local directory or Hub name of the dense base model.
        output: directory to write; it must not exist, unless ``overwrite``. Several
            sparsities have one each, see ``outputs``.
        sparsity: target s in [0, 1): fraction of the linears' bytes not read; or
            several, for a directory each. None where ``bits`` or ``max_kl`` is given.
        calibration_data: files of text or JSONL (see ``texts.documents``), with weights
            or without; none lets the model write its own text.
        recipe: name of a recipe, or a JSON file (see ``recipes``).
        save_recipe: where to write the recipe with what every linear got.
        rho: share of the kept budget that goes to exact channels, in (0, 1];
            1 means no low-rank factors. None takes the recipe's.
        samples: number of calibration windows.
        tokens: tokens per window; None takes 4096 (of text that the
            model writes, fewer) or the model's length if shorter.
        device: where calibration runs ("auto": CUDA if available).
        dtype: compute dtype of calibration ("auto": float32 on CPU, the checkpoint's
            on CUDA).
        bits: mean bits of a weight that a token reads, where weights are read in
            planes, scales and zero points included; instead of ``sparsity``.
        max_kl: largest KL divergence from the dense model on held-out text, nats; the
            largest sparsity within it is found. Instead of ``sparsity`` and ``bits``.
        weights: "as-stored", or the format that the linears' weights are quantized to
            while they load, for calibration and when served.
        head: the same for the output layer.
        head_sparsity: target of the output layer in [0, 1); 0 leaves it dense.
        copy_weights: copy the base's files instead of linking to them; linears that
            are quantized while they load are written as they are served.
        seed: chooses the calibration windows and the randomised SVD's start.
        overwrite: replace an output that an earlier run wrote.
        revision: branch, tag or commit of a Hub model.
    """

    model: str
    output: Path
    sparsity: float | tuple[float, ...] | None
    calibration_data: tuple[Path | TextFile, ...] = ()
    rho: float | None = None
    samples: int = 16
    tokens: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    weights: str = AS_STORED
    head: str = AS_STORED
    head_sparsity: float = 0.0
    copy_weights: bool = False
    seed: int = 0
    overwrite: bool = False
    revision: str | None = None
    recipe: str = "best"
    bits: float | None = None
    max_kl: float | None = None
    save_recipe: Path | None = None

    def __post_init__(self) -> None:
        self._check_target()
        # Written as `not (a <= x < b)` so that NaN is refused too.
        for sparsity in self.sparsities:
            if not 0.0 <= sparsity < 1.0:
                raise PrepareError(
                    f"--sparsity must lie in [0, 1), got {sparsity}: 0.5 skips half of"
                    " the bytes of the linear layers"
                )
        if len(set(self.outputs)) < len(self.outputs):
            raise PrepareError(
                f"--sparsity {' '.join(f'{one:g}' for one in self.sparsities)}: two"
                " values are the same; give each sparsity once"
            )
        if len(self.outputs) > 1 and self.save_recipe is not None:
            raise PrepareError(
                f"--save-recipe {self.save_recipe}: goes with one --sparsity, got"
                f" {len(self.outputs)}; every artifact lists its linears in"
                " rsparse.json"
            )
        if not 0.0 <= self.head_sparsity < 1.0:
            raise PrepareError(
                f"--head-sparsity must lie in [0, 1), got {self.head_sparsity}: 0.3"
                " skips 30% of the bytes of the output layer"
            )
        if self.rho is not None and not 0.0 < self.rho <= 1.0:
            raise PrepareError(
                f"--rho must lie in (0, 1], got {self.rho}: 0.95 gives 5% of the kept"
                " bytes to low-rank factors, 1 uses none"
            )
        if self.samples < 1:
            raise PrepareError(
                f"--calibration-samples must be at least 1, got {self.samples}"
            )
        if self.tokens is not None and self.tokens < 1:
            raise PrepareError(
                f"--calibration-tokens must be at least 1, got {self.tokens}"
            )
        if not 0 <= self.seed < 2**63:
            raise PrepareError(f"--seed must lie in [0, 2**63), got {self.seed}")
        for name, value, allowed in (
            ("--device", self.device, DEVICES),
            ("--dtype", self.dtype, DTYPES),
            ("--weights", self.weights, WEIGHTS),
            ("--head", self.head, HEADS),
        ):
            if value not in allowed:
                raise PrepareError(
                    f"{name} must be one of {', '.join(allowed)}, got {value!r}"
                )
        if self.head_sparsity > 0 and self.head in DENSE_HEAD_FORMATS:
            raise PrepareError(
                f"--head-sparsity {self.head_sparsity:g}: an output layer in"
                f" {self.head} is dense at every step; leave it out, or use --head fp8"
            )

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The sparsities that were asked for; empty where another target is given."""
        if self.sparsity is None:
            return ()
        return self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,)

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The directories to write: ``output``, or ``OUTPUT-S`` for several S."""
        if len(self.sparsities) < 2:
            return (self.output,)
        folder, name = self.output.parent, self.output.name
        return tuple(folder / f"{name}-{one:g}" for one in self.sparsities)

    def held_out(self, tokens: int) -> int:
        """Windows to hold out: half as many as calibrate, within limits.

        Args:
            tokens: of each window.
        """
        if self.max_kl is None:
            return 0
        return max(2, min(self.samples // 2, math.ceil(HELD_OUT_TOKENS / tokens)))

    def _check_target(self) -> None:
        """Sparsity for weights that are read whole, bits for those in planes."""
        if self.max_kl is not None:
            if self.sparsities or self.bits is not None:
                raise PrepareError(
                    f"--max-kl {self.max_kl:g}: finds the sparsity, so it goes without"
                    " --sparsity and --bits"
                )
            if not 0.0 < self.max_kl < math.inf:
                raise PrepareError(
                    f"--max-kl must be a positive number, got {self.max_kl}: 0.02 nats"
                    " lies between the losses of good 4-bit and 3-bit formats"
                )
        elif self.weights == IN_PLANES:
            if self.sparsity is not None or self.bits is None:
                raise PrepareError(
                    f"--weights {IN_PLANES} takes --bits, the mean bits of a weight"
                    " that a token reads, or --max-kl, and no --sparsity: --bits 4.2"
                    " reads as much as INT4 does"
                )
            if not MIN_BITS <= self.bits <= MAX_BITS:
                raise PrepareError(
                    f"--bits must lie in [{MIN_BITS:g}, {MAX_BITS:g}], got {self.bits}:"
                    " 4.2 reads as much as INT4 does, 3.2 a quarter less"
                )
        elif self.bits is not None:
            raise PrepareError(
                f"--bits {self.bits} is for weights that are read in planes; add"
                f" --weights {IN_PLANES}, or use --sparsity"
            )
        elif not self.sparsities:
            raise PrepareError(
                "--sparsity is missing: 0.5 skips half of the bytes of the linear"
                " layers; or give --max-kl, and the sparsity is found"
            )
