# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity in weights and activations, and where they are."""

import torch
from torch import Tensor

from vllm_rsparse.errors import NotFiniteError


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass, without temporaries."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def check_weight(stored: Tensor, converted: Tensor, where: str) -> None:
    """Refuse a weight that cannot be calibrated.

    Args:
        stored: in the checkpoint's dtype.
        converted: in the dtype to compute in.
        where: checkpoint and tensor.

    Raises:
        NotFiniteError: it contains NaN or infinity, or does once converted.
    """
    if is_finite(converted):
        return
    if is_finite(stored):
        raise NotFiniteError(
            f"{where} has values up to {stored.abs().max().item():.3g}, too large for"
            f" {_name(converted.dtype)}; use --dtype bfloat16 or float32"
        )
    place = (~torch.isfinite(stored)).nonzero()[0].tolist()
    raise NotFiniteError(
        f"{where} contains {stored[tuple(place)].item()} at {place}; the file is"
        " damaged, or the model was saved after training had diverged: download it"
        " again, or choose another checkpoint"
    )


def check_activations(x: Tensor, what: str) -> None:
    """Refuse activations that cannot be used for calibration.

    Args:
        x: activations.
        what: their name in messages: "the input of model.layers.0.mlp.up_proj".

    Raises:
        NotFiniteError: they contain NaN or infinity.
    """
    if not is_finite(x):
        raise NotFiniteError(
            f"{what}: NaN or infinity on the calibration text, although the weights"
            " are finite; use --dtype bfloat16 or float32, and check that the base"
            " model works"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
