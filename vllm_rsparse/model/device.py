# SPDX-License-Identifier: Apache-2.0
"""Where a model that is not served is computed."""

import torch

from vllm_rsparse.errors import DeviceError


def choose_device(name: str) -> torch.device:
    """The device that ``--device`` names; "auto" is CUDA if available.

    Raises:
        DeviceError: there is no such device here.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise DeviceError(
            "--device cuda: this torch sees no CUDA device; use --device cpu"
        )
    if name == "auto":
        name = "cuda" if available else "cpu"
    return torch.device(name)
