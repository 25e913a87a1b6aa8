# SPDX-License-Identifier: Apache-2.0
"""Host memory that a GPU adds to, so that nothing has to copy or wait for counts."""

import ctypes
from typing import Any

import torch
from torch import Tensor

_REGISTER_DEVICEMAP = 2  # CU_MEMHOSTREGISTER_DEVICEMAP


def on_device(slots: Tensor, device: torch.device) -> Tensor:
    """The same memory as the device sees it: page-locked, and mapped for a GPU.

    Args:
        slots: contiguous host memory; for a GPU it stays locked until the process ends.
        device: where it is to be used; its CUDA context is current.

    Raises:
        RuntimeError: the GPU cannot map it; since 6.5 Linux refuses this for
            disk-backed files. Other CUDA calls are not affected.
    """
    if device.type == "cpu":
        return slots
    return torch.as_tensor(_Mapped(slots), device=device)


class _Mapped:
    """Page-locked host memory, at the address by which the GPU reaches it.

    Uses the driver, not the runtime: the runtime keeps an error that it returned, and
    PyTorch's next kernel raises it again. On an H200 (torch 2.11, a disk-backed file)
    this failed the step that was only to be counted.
    """

    def __init__(self, slots: Tensor) -> None:
        self.slots = slots  # must outlive the view
        driver = ctypes.CDLL("libcuda.so.1")
        host, pointer = ctypes.c_void_p(slots.data_ptr()), ctypes.c_uint64()
        _check(
            driver,
            "cuMemHostRegister_v2",
            host,
            ctypes.c_size_t(slots.nbytes),
            ctypes.c_uint(_REGISTER_DEVICEMAP),
        )
        _check(
            driver,
            "cuMemHostGetDevicePointer_v2",
            ctypes.byref(pointer),
            host,
            ctypes.c_uint(0),
        )
        self.__cuda_array_interface__ = {
            "shape": tuple(slots.shape),
            "typestr": "<i8",
            "data": (pointer.value, False),
            "version": 3,
        }


def _check(driver: ctypes.CDLL, function: str, *arguments: Any) -> None:
    status = getattr(driver, function)(*arguments)
    if status != 0:
        raise RuntimeError(f"{function} failed with CUDA driver error {status}")
