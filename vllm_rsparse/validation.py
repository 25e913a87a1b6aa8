# SPDX-License-Identifier: Apache-2.0
"""Schemas of files and configs: pydantic checks them, the messages are ours.

A schema is a frozen ``pydantic.dataclasses.dataclass`` with ``config=CONFIG`` whose
fields have strict types and a description that completes "FIELD must ..."::

    sparsity: StrictFloat = must("lie in [0, 1]", ge=0, le=1)

so that a refusal reads ``FILE: sparsity must lie in [0, 1], got 1.5``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import Repr
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from vllm_rsparse.errors import RSparseError

T = TypeVar("T")

# Each type is strict by itself: a strict dataclass would not accept a JSON object.
CONFIG = ConfigDict(extra="forbid")


def must(allowed: str, **constraints: Any) -> Any:
    """A field of a schema.

    Args:
        allowed: completes "FIELD must ..." in messages: "lie in [0, 1]".
        constraints: those of ``pydantic.Field``, including its default.
    """
    return Field(description=allowed, **constraints)


def one_of(*names: str, **default: Any) -> Any:
    """A string field with a fixed set of values."""
    pattern = f"^({'|'.join(map(re.escape, names))})$"
    return must(f"be one of {', '.join(names)}", pattern=pattern, **default)


def sha256(**default: Any) -> Any:
    """A string field with a digest, in the form of ``hexdigest``."""
    allowed = "be a string of 64 hexadecimal digits"
    return must(allowed, pattern="^[0-9a-f]{64}$", **default)


def read_json(
    path: Path,
    error: type[RSparseError],
    remedy: str,
    where: str | None = None,
) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        error: class of the error to raise.
        remedy: what to do about any fault, added to the message.
        where: what users call the file, for messages; None takes the path.

    Raises:
        RSparseError: of the given class: the file is missing, unreadable, not UTF-8 or
            not JSON, or holds something other than an object.
    """
    where = where or str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise error(f"{where}: cannot be read ({reason(fault)}){remedy}") from fault
    value = parse_json(text, where, error, remedy)
    if not isinstance(value, dict):
        raise error(f"{where}: expected a JSON object, got {shown(value)}{remedy}")
    return value


def reason(fault: OSError | UnicodeDecodeError) -> str:
    """Why a file could not be read, without the path, which the message has anyway."""
    if isinstance(fault, UnicodeDecodeError):
        return f"not UTF-8 text, byte {fault.start}"
    return fault.strerror or str(fault)


def parse_json(
    text: str | bytes, where: str, error: type[RSparseError], remedy: str = ""
) -> Any:
    """Parse JSON of any origin.

    Args:
        text: the file's content.
        where: the file, for messages.
        error: what to raise.
        remedy: what to do about any fault, added to the message.

    Raises:
        RSparseError: of the given class: not JSON, nested too deeply, NaN, or a number
            with thousands of digits.
    """
    try:
        return json.loads(text, parse_constant=_constant)
    except (ValueError, RecursionError) as fault:
        raise error(f"{where}: not valid JSON ({fault}){remedy}") from fault


def _constant(name: str) -> float:
    """Infinity, which some models' configs contain; Python also reads NaN."""
    if name == "NaN":
        raise ValueError("a value is NaN, which is not a number")
    return float(name)


def validate(
    schema: type[T], raw: Any, where: str, error: type[RSparseError], remedy: str = ""
) -> T:
    """Build a schema's object from parsed JSON.

    Args:
        schema: a dataclass as described above.
        raw: the parsed value.
        where: file or parameter, for messages.
        error: class of the error to raise.
        remedy: what to do about any fault, added to the message.

    Raises:
        RSparseError: of the given class; names the file, the first faulty key by its
            path, what was found and what is allowed.
    """
    try:
        return TypeAdapter(schema).validate_python(raw)
    except ValidationError as fault:
        raise error(_explain(fault, schema, raw, where) + remedy) from fault


def _explain(fault: ValidationError, schema: type, raw: Any, where: str) -> str:
    """One line for the first fault; the others may follow from it."""
    first = fault.errors(include_url=False)[0]
    kind, location = first["type"], first["loc"]
    path, hint, found, allowed = "", schema, raw, None
    for depth, step in enumerate(location):
        hint = _given(hint)
        fields = _fields(hint)
        if fields is not None and step not in fields:
            if kind == "unexpected_keyword_argument":
                known = ", ".join(fields)
                return f"{where}{path}: unknown key {shown(step)}; known are {known}"
            break
        if fields is not None and isinstance(step, str):
            if kind == "missing" and depth == len(location) - 1:
                return f"{where}{path}: key {step!r} is missing"
            path += f".{step}" if path else f": {step}"
            hint, allowed = fields[step].annotation, fields[step].description
        elif (element := _element(hint)) is not None:
            path += f"[{shown(step)}]"
            hint, allowed = element, None
        else:  # inside a value whose description covers all of it
            break
        found = _at(found, step)
    if kind == "value_error":
        return f"{where}{path}: {first['ctx']['error']}"
    if kind == "dataclass_type":
        return f"{where}{path}: expected an object, got {type(found).__name__}"
    if allowed is None:
        return f"{where}{path}: {first['msg']}, got {shown(found)}"
    return f"{where}{path} must {allowed}, got {shown(found)}"


def _given(hint: Any) -> Any:
    """``T`` of ``T | None``: what a value that was given should have been."""
    if get_origin(hint) in (Union, UnionType):
        types = [one for one in get_args(hint) if one is not type(None)]
        return types[0] if len(types) == 1 else hint
    return hint


def _fields(hint: Any) -> Mapping[str, Any] | None:
    """Fields of a schema; None for other types."""
    return getattr(hint, "__pydantic_fields__", None)


def _element(hint: Any) -> Any:
    """Type of an object's values, or of a list's items that are schemas, else None."""
    arguments = get_args(hint)
    if get_origin(hint) is dict:
        return arguments[1]
    if get_origin(hint) in (list, tuple) and _fields(arguments[0]) is not None:
        return arguments[0]
    return None


def _at(value: Any, step: Any) -> Any:
    if isinstance(value, Mapping):
        return value.get(step)
    if isinstance(value, Sequence) and isinstance(step, int) and step < len(value):
        return value[step]
    return None


def shown(value: Any) -> str:
    """The value, shortened, without characters that control a terminal."""
    short = Repr()
    short.maxlevel = 2
    short.maxstring = short.maxother = 80
    return short.repr(value)
