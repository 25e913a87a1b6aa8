# SPDX-License-Identifier: Apache-2.0
"""JSONL: one object per line, with ``text`` (a string) or ``messages`` (a chat).

Other keys of an object, such as an identifier, are not read, apart from a chat's
``tools``.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.validation import shown

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".ndjson", ".json")
_ALLOWED = 'every line must be an object with "text" or with "messages"'


@dataclass(frozen=True)
class Line:
    """What is read of one line.

    Attributes:
        number: of the line, from 1.
        key: which of the two the object has.
        value: a string that is not blank, or a list of at least one message.
        tools: of a chat; None where there are none.
    """

    number: int
    key: Literal["text", "messages"]
    value: Any
    tools: list[dict[str, Any]] | None = None


def is_jsonl(path: Path, text: str, name: str) -> bool:
    """Whether a file holds JSONL, by its name or by its first line.

    Args:
        path: the file's name.
        text: its content, not blank.
        name: the file, for messages.

    Raises:
        CheckpointError: all of it is one JSON document, which would be misread as text.
    """
    start = text.lstrip()
    first = start.split("\n", 1)[0]
    if isinstance(_parsed(first), dict):
        return True
    if start.startswith(("{", "[")):
        whole = _parsed(text)
        nested = isinstance(whole, list) and any(isinstance(x, dict) for x in whole)
        if isinstance(whole, dict) or nested:
            raise CheckpointError(
                f"{name}: is one JSON document, and {_ALLOWED}; convert it, for a list"
                " with `jq -c '.[]' FILE`, for one object with `jq -c . FILE`"
            )
    return path.suffix.lower() in SUFFIXES


def parse_lines(text: str, name: str) -> Iterator[Line]:
    """Read the lines of a JSONL file; blank lines and blank texts are left out.

    Args:
        text: the file's content.
        name: the file, for messages.

    Raises:
        CheckpointError: a line is not of the schema, lines differ in it, or no text is
            left; names the line.
    """
    first: Line | None = None
    blank = 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        parsed = _line(line, number, f"{name}, line {number}")
        if parsed is None:
            blank += 1
            continue
        first = first or parsed
        if parsed.key != first.key:
            raise CheckpointError(
                f'{name}, line {number}: has "{parsed.key}", but line {first.number}'
                f' has "{first.key}"; put texts and chats into files of their own'
            )
        yield parsed
    if first is None:
        raise CheckpointError(f"{name}: all its texts are empty; leave it out")
    if blank:
        logger.warning("%s: %d empty texts are left out", name, blank)


def _line(line: str, number: int, where: str) -> Line | None:
    """The line's content; None for a blank text."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: not valid JSON ({error}); {_ALLOWED}"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: is {shown(value)}; {_ALLOWED}")
    found = value.keys() & {"text", "messages"}
    if len(found) == 2:
        raise CheckpointError(
            f'{where}: has both "text" and "messages"; keep the one to be read'
        )
    if "messages" in found:
        return Line(number, "messages", *read_chat(value, where))
    if not found:
        keys = ", ".join(map(shown, value)) or "none"
        raise CheckpointError(
            f'{where}: has neither "text" nor "messages", its keys are {keys};'
            " rename the one that holds the text, or write chats as"
            ' {"messages": [{"role": "user", "content": "..."}, ...]}'
        )
    text = value["text"]
    if not isinstance(text, str):
        raise CheckpointError(f"{where}: text must be a string, got {shown(text)}")
    return Line(number, "text", text) if text.strip() else None


def read_chat(
    value: dict[str, Any], where: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools of an object with ``messages``.

    Raises:
        CheckpointError: they are not of the schema; names ``where``.
    """
    messages, tools = value["messages"], value.get("tools")
    if not isinstance(messages, list) or not messages:
        raise CheckpointError(
            f"{where}: messages must be a list of at least one message, got"
            f" {shown(messages)}; leave the line out"
        )
    for index, message in enumerate(messages):
        _check_message(message, f"{where}: messages[{index}]")
    if tools is not None and not isinstance(tools, list):
        raise CheckpointError(f"{where}: tools must be a list, got {shown(tools)}")
    return messages, tools or None


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise CheckpointError(
            f'{where} must be an object with "role" and "content", got {shown(message)}'
        )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise CheckpointError(
            f'{where}.role must be a string such as "user", got {shown(role)}'
        )
    called = content is None and message.get("tool_calls")
    if not isinstance(content, str) and not called:
        raise CheckpointError(
            f"{where}.content must be a string, got {shown(content)}; join the parts of"
            " a list, and leave out chats with images"
        )


def _parsed(text: str) -> Any:
    """JSON's value, or None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
