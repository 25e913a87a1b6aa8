# SPDX-License-Identifier: Apache-2.0
"""``KnownLaunches``: launches whose compiled program the caller can name."""

from collections.abc import Hashable
from typing import Any

from torch import Tensor


class KnownLaunches:
    """A kernel's compiled programs by a key, so that Triton need not look them up.

    Triton inspects every argument of every launch to find its program: 12 us on an idle
    core (AMD EPYC), and 4 where the program is known. The steps of a prompt, four
    linears a layer, are in no CUDA graph and wait for the host.

    Args:
        kernel: of ``triton.jit``. Its constants are its last parameters.
        options: Triton's options of every launch, such as ``num_warps``.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self._kernel = kernel
        self._options = options
        self._programs: dict[Hashable, Any] = {}

    def __call__(
        self,
        key: Hashable,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
    ) -> None:
        """Launch the kernel.

        Args:
            key: determines, together with the constants, what Triton compiles the
                kernel for: the device and, of every argument, what ``number_class`` or
                ``tensor_class`` returns, and whether it is None.
            grid: programs.
            arguments: the kernel's parameters that are not constants, in order.
            constants: its constants, in order.
        """
        key = key, constants
        program = self._programs.get(key)
        if program is not None:
            program[grid](*arguments, *constants)
            return
        names = self._kernel.arg_names[len(arguments) :]
        options = dict(zip(names, constants, strict=True)) | self._options
        # Triton's interpreter compiles nothing.
        program = self._kernel[grid](*arguments, **options)
        if program is not None:
            self._programs[key] = program


def number_class(value: int) -> tuple[bool, bool, bool]:
    """What Triton compiles a kernel for, of a number that is not negative."""
    return value == 1, value % 16 == 0, value >= 2**31


def tensor_class(tensor: Tensor) -> tuple[Any, bool]:
    """What Triton compiles a kernel for, of a tensor."""
    return tensor.dtype, tensor.data_ptr() % 16 == 0
