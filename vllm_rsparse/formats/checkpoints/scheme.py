# SPDX-License-Identifier: Apache-2.0
"""``Scheme``: a parsed ``quantization_config``. Reading its keys, refusing variants."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.formats.checkpoints.layout import Layout
from vllm_rsparse.formats.int4 import GROUPS


class Scheme(ABC):
    """Which linears of a checkpoint are quantized, and in which layout.

    Attributes:
        method: ``quant_method`` of the config.
        tensors_decide: whether a linear that the scheme does not exclude may still be
            a plain one in the files.
    """

    method: ClassVar[str]
    tensors_decide: bool = False

    @abstractmethod
    def layout(self, name: str) -> Layout | None:
        """Layout of a linear by its name in the checkpoint; None if it is plain."""


class Keys(BaseModel):
    """Base of the models below: right types for known keys, unknown keys ignored.

    Quantization tools add their own keys (versions, dampening, losses), which do not
    change the meaning of the tensors.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


AnyKeys = TypeVar("AnyKeys", bound=Keys)


def read_keys(model: type[AnyKeys], config: Mapping[str, Any], where: str) -> AnyKeys:
    """Validate a ``quantization_config``.

    Raises:
        CheckpointError: names the file, the first wrong key and its value.
    """
    try:
        return model.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        found = f", got {str(first['input'])[:60]!r}"
        raise CheckpointError(
            f"{where}: quantization_config: {key}: {first['msg']}"
            f"{'' if first['type'] == 'missing' else found}; download the checkpoint"
            " again, or use one that another tool quantized"
        ) from None


def refuse(where: str, what: str, instead: str) -> NoReturn:
    """Raise the error of a variant that is not supported.

    Args:
        where: file that requires it.
        what: the variant, by the name that its users know.
        instead: what to do.
    """
    raise CheckpointError(f"{where}: {what} is not supported; {instead}")


def layout_group(where: str, group_size: int) -> int | None:
    """A group size of a config: one that the format int4 has, or -1 for all of K.

    Raises:
        CheckpointError: another size.
    """
    if group_size == -1:
        return None
    if group_size not in GROUPS:
        refuse(
            where,
            f"a group size of {group_size}",
            f"use a checkpoint with groups of {', '.join(map(str, GROUPS))}, or -1",
        )
    return group_size
