# SPDX-License-Identifier: Apache-2.0
"""Documents, and the files that hold them."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.texts.jsonl import is_jsonl, parse_lines

Kind = Literal["text", "messages"]


@dataclass(frozen=True)
class Document:
    """One text or one chat.

    Attributes:
        kind: which of the two.
        content: a string, or a chat's messages, each with ``role`` and ``content``.
        line: where it begins in its file, from 1.
        tools: of a chat, as its template takes them; None where there are none.
    """

    kind: Kind
    content: str | Sequence[Mapping[str, Any]]
    line: int = 1
    tools: Sequence[Mapping[str, Any]] | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any], line: int = 1) -> "Document":
        """Of an object that ``to_json`` gave."""
        kind: Kind = "messages" if "messages" in value else "text"
        return cls(kind, value[kind], line, value.get("tools"))

    def to_json(self) -> dict[str, Any]:
        """The object that stands for it in a JSONL file."""
        value: dict[str, Any] = {self.kind: self.content}
        return value if self.tools is None else value | {"tools": self.tools}


@dataclass(frozen=True)
class TextFile:
    """A file that the user names.

    Attributes:
        path: of the file.
        weight: its share of the windows, relative to the other files' weights. None
            for files whose documents are pooled.
    """

    path: Path
    weight: float | None = None

    @classmethod
    def parse(cls, argument: str) -> "TextFile":
        """Read ``FILE`` or ``FILE=WEIGHT``.

        An argument that is an existing file's whole name has no weight, so names that
        contain ``=`` can be given.

        Raises:
            CheckpointError: the weight is not a positive number.
        """
        name, equals, text = argument.rpartition("=")
        if not equals or Path(argument).exists():
            return cls(Path(argument))
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise CheckpointError(
                f"--calibration-data {argument}: there is no such file, and as"
                f" FILE=WEIGHT its weight must be a positive number, got {text!r}"
            )
        return cls(Path(name), weight)


@dataclass(frozen=True)
class Source:
    """Documents of one kind with one origin.

    Attributes:
        name: option and file, for messages.
        file: where they are.
        sha256: of the file's bytes.
        kind: of all documents.
        documents: at least one.
        weight: as in ``TextFile``.
    """

    name: str
    file: Path
    sha256: str
    kind: Kind
    documents: tuple[Document, ...]
    weight: float | None = None

    def where(self, document: Document) -> str:
        """Option, file and line of a document, for messages."""
        return f"{self.name}, line {document.line}"


def read_sources(files: Iterable[Path | TextFile], option: str) -> list[Source]:
    """Read UTF-8 text files and JSONL files.

    A file is JSONL if its name ends in .jsonl, .ndjson or .json, or if its first line
    is a JSON object. Any other file is one document.

    Args:
        files: what to read.
        option: that named the files, for messages.

    Raises:
        CheckpointError: a file is missing, empty, not text, or not JSONL of one of the
            two schemas; a file is given twice, or only some have a weight.
    """
    named = [file if isinstance(file, TextFile) else TextFile(file) for file in files]
    seen: set[Path] = set()
    for file in named:
        path = file.path.resolve()
        if path in seen:
            raise CheckpointError(
                f"{option} {file.path}: is given twice, so its text would count twice;"
                " give it once"
            )
        seen.add(path)
    bare = [file for file in named if file.weight is None]
    if bare and len(bare) < len(named):
        raise CheckpointError(
            f"{option} {bare[0].path}: has no weight, but other files have; give all"
            f" files a weight ({bare[0].path}=1), or none to pool them"
        )
    return [_read(file, option) for file in named]


def _read(file: TextFile, option: str) -> Source:
    name = f"{option} {file.path}"
    data = _read_bytes(file.path, name)
    text = _decode(data, name)
    if is_jsonl(file.path, text, name):
        documents = tuple(
            Document(line.key, line.value, line.number, line.tools)
            for line in parse_lines(text, name)
        )
    else:
        documents = (Document("text", text),)
    digest = hashlib.sha256(data).hexdigest()
    return Source(name, file.path, digest, documents[0].kind, documents, file.weight)


def read_text(file: Path, name: str) -> str:
    """The text of a UTF-8 file.

    Args:
        file: what to read.
        name: of the file, for messages.

    Raises:
        CheckpointError: it is missing, empty or not text.
    """
    return _decode(_read_bytes(file, name), name)


def _read_bytes(file: Path, name: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read ({error.strerror})") from error


def _decode(data: bytes, name: str) -> str:
    if data.startswith(b"PAR1"):
        raise CheckpointError(
            f"{name}: Parquet is not read; convert it to JSONL, for example with"
            " pandas.read_parquet(FILE).to_json(OUT, orient='records', lines=True)"
        )
    try:
        text = data.decode("utf-8-sig")  # a byte order mark is not text
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{name}: not UTF-8 text (byte {error.start}); convert it, or leave it out"
        ) from error
    if "\0" in text:
        raise CheckpointError(
            f"{name}: contains NUL bytes, so it is not text; leave it out"
        )
    if not text.strip():
        raise CheckpointError(f"{name}: is empty; leave it out")
    return text
