# SPDX-License-Identifier: Apache-2.0
"""``launch``: a kernel's launch, for which Triton need not look up the program again.

Triton inspects every argument of every launch to find what it has compiled for such
arguments: 12 us on an idle core (AMD EPYC) with Triton 3.6, which this does in 6. The
steps of a prompt, four linears a layer, are in no CUDA graph and wait for the host.
"""

from collections.abc import Iterable
from typing import Any

import torch

# What was compiled, by what it was compiled for; and its kernel, so that no other gets
# the same identity.
_programs: dict[tuple[Any, ...], tuple[Any, Any]] = {}


def launch(
    kernel: Any,
    device: torch.device,
    grid: tuple[int, int, int],
    *arguments: Any,
    num_warps: int,
    num_stages: int | None = None,
    pdl: bool = False,
    registers: int | None = None,
    **constants: Any,
) -> None:
    """``kernel[grid](...)``, with Triton's checks in the first of similar calls only.

    Args:
        kernel: of ``triton.jit``; its constants are its last parameters.
        device: of the tensors, the current one.
        grid: programs.
        arguments: what is not a constant, in order: tensors, descriptors of them,
            integers that are not negative and below 2^63, None and tuples of these,
            nested alike in all calls of a kernel.
        num_warps: warps of a program.
        num_stages: Triton's option; None leaves it at its default.
        pdl: programmatic dependent launch.
        registers: most of a thread; None leaves them to the compiler.
        constants: all of them, in the order of the kernel's parameters; each of one
            type in all calls of a kernel, as 1, 1.0 and True are the same key.

    Raises:
        TypeError: the constants are not the kernel's, or are in another order.
    """
    values = tuple(constants.values())
    classes = [id(kernel), device, num_warps, num_stages, pdl, registers, values]
    _add_classes(arguments, classes)
    key = tuple(classes)
    known = _programs.get(key)
    if known is not None:
        known[1][grid](*arguments, *values)
        return
    names = list(kernel.arg_names[len(arguments) :])
    if names != list(constants):
        raise TypeError(f"the kernel's constants are {names}, got {list(constants)}")
    options: dict[str, Any] = {"num_warps": num_warps}
    if num_stages is not None:
        options["num_stages"] = num_stages
    if registers is not None:
        options["maxnreg"] = registers
    if pdl:
        # Not every device knows the option.
        options["launch_pdl"] = True
    program = kernel[grid](*arguments, **constants, **options)
    # Triton's interpreter compiles nothing.
    if program is not None:
        _programs[key] = kernel, program


def _add_classes(arguments: Iterable[Any], classes: list[Any]) -> None:
    """What Triton compiles a kernel for, of each argument.

    Of a number: whether it is 1, whether 16 divides it, and whether it needs 64 bits.
    Of a tensor: its dtype, and whether 16 divides its address. Of a descriptor: the
    dtype, and the shape of its boxes.
    """
    for value in arguments:
        if type(value) is int:
            even, long = value & 15 == 0, value >> 31 > 0
            classes.append(-1 if value == 1 else even + 2 * long)
        elif value is None:
            classes.append(None)
        elif isinstance(value, tuple):
            _add_classes(value, classes)
        elif isinstance(value, torch.Tensor):
            classes.append(value.dtype)
            classes.append(value.data_ptr() & 15 == 0)
        else:
            classes.append(value.base.dtype)
            classes.append(tuple(value.block_shape))
