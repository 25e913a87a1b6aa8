# SPDX-License-Identifier: Apache-2.0
"""Every weight format by its name and by its number. A new format adds a line here."""

from vllm_rsparse.formats.base import WeightFormat, WeightFormatError
from vllm_rsparse.formats.fp8 import FP8
from vllm_rsparse.formats.fp8_block import FP8_BLOCK
from vllm_rsparse.formats.int4 import INT4
from vllm_rsparse.formats.plain import FLOAT

FORMATS: tuple[WeightFormat, ...] = (FLOAT, FP8, FP8_BLOCK, INT4)

_BY_CODE = {one.code: one for one in FORMATS}
_BY_NAME = {one.name: one for one in FORMATS}


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
