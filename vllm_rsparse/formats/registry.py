# SPDX-License-Identifier: Apache-2.0
"""Every weight format by its name and by its number. A new format adds a line here.

A format that weights are quantized to while they load adds one to ``LOAD_TIME`` too,
and ``names`` repeats the names.
"""

from vllm_rsparse.errors import SettingError
from vllm_rsparse.formats.base import WeightFormat, WeightFormatError
from vllm_rsparse.formats.fp8 import FP8, FP8_WHILE_LOADING
from vllm_rsparse.formats.fp8_block import FP8_BLOCK
from vllm_rsparse.formats.int4 import INT4
from vllm_rsparse.formats.int8 import INT8
from vllm_rsparse.formats.int8_planes import INT8_PLANES, PLANES_WHILE_LOADING
from vllm_rsparse.formats.load_time import LoadTimeFormat
from vllm_rsparse.formats.names import AS_STORED
from vllm_rsparse.formats.plain import FLOAT

# What kernels read.
FORMATS: tuple[WeightFormat, ...] = (FLOAT, FP8, FP8_BLOCK, INT4, INT8_PLANES)
# What checkpoints have besides, and is served as another.
CHECKPOINT_ONLY: tuple[WeightFormat, ...] = (INT8,)
LOAD_TIME: tuple[LoadTimeFormat, ...] = (FP8_WHILE_LOADING, PLANES_WHILE_LOADING)

_BY_CODE = {one.code: one for one in FORMATS}
_BY_NAME = {one.name: one for one in (*FORMATS, *CHECKPOINT_ONLY)}


def format_of_code(code: int) -> WeightFormat:
    """The format of a number in the op's schema."""
    return _BY_CODE[code]


def format_of_name(name: str) -> WeightFormat:
    """The format with this name.

    Raises:
        WeightFormatError: the name is unknown.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        raise WeightFormatError(
            f"weight format {name!r} is unknown; known are {', '.join(_BY_NAME)}"
        ) from None


def load_time_format(name: str, where: str = "weights") -> LoadTimeFormat | None:
    """The format that a checkpoint's weights are quantized to while they load.

    Args:
        name: value of a setting; ``AS_STORED`` is None.
        where: the setting, for the message.

    Raises:
        SettingError: the name is unknown.
    """
    if name == AS_STORED:
        return None
    for one in LOAD_TIME:
        if one.name == name:
            return one
    known = ", ".join([AS_STORED, *(one.name for one in LOAD_TIME)])
    raise SettingError(f"{where} must be one of {known}, got {name!r}")
