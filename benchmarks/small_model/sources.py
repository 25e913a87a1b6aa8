# SPDX-License-Identifier: Apache-2.0
"""Text that a machine has anyway: Python sources, and the English in /usr/share/doc."""

import gzip
import hashlib
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

# In characters. Shorter files are stubs; longer ones are tables and generated code.
SHORTEST, LONGEST = 400, 300_000
LONGEST_LINE = 90  # mean; above it a file is minified, or data
COPIES = {"site-packages", "dist-packages", "_vendor", "vendored", "_vendored"}
DOCUMENTATION = {".html", ".md", ".pod", ".rst", ".txt"}
BLOCKS = {"br", "dd", "div", "dt", "h1", "h2", "h3", "h4", "li", "p", "pre", "tr"}
UNSEEN = {"head", "script", "style"}


class Document(NamedTuple):
    """One file's text.

    Attributes:
        domain: "code" or "english".
        group: what it came with, a Python or a Debian package: never split up.
        text: its content, without markup.
    """

    domain: str
    group: str
    text: str


def python_roots() -> list[Path]:
    """The standard library and the site-packages of the running Python."""
    paths = sysconfig.get_paths()
    return [Path(paths[name]) for name in ("stdlib", "purelib")]


def documents(python: Iterable[Path], docs: Iterable[Path]) -> Iterator[Document]:
    """All usable files, each content once.

    Args:
        python: folders of Python packages and modules.
        docs: folders whose subfolders are packages, as /usr/share/doc is laid out.
    """
    seen = set()
    for document in (*_code(python), *_english(docs)):
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield document


def _code(roots: Iterable[Path]) -> Iterator[Document]:
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root).parts
            if COPIES.intersection(parts):
                continue
            text = _read(file)
            if _usable(text) and len(text) < LONGEST_LINE * (text.count("\n") + 1):
                yield Document("code", parts[0].removesuffix(".py"), text)


def _english(roots: Iterable[Path]) -> Iterator[Document]:
    for root in roots:
        for file in sorted(root.rglob("*")):
            name = Path(file.name.removesuffix(".gz"))
            changes = name.stem.lower().startswith(
                ("changelog", "copyright", "license")
            )
            if changes or name.suffix not in DOCUMENTATION:
                continue
            text = _read(file)
            if name.suffix == ".html":
                text = _without_markup(text)
            if _usable(text) and sum(map(str.isascii, text)) > 0.97 * len(text):
                yield Document("english", file.relative_to(root).parts[0], text)


def _read(file: Path) -> str:
    """The file's text; empty where it is no text or cannot be read."""
    if not file.is_file() or file.is_symlink():
        return ""
    try:
        raw = file.read_bytes()
        return (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return ""


def _usable(text: str) -> bool:
    return SHORTEST < len(text) < LONGEST and "\0" not in text


class _Markup(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.unseen = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.unseen += tag in UNSEEN
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.unseen -= tag in UNSEEN

    def handle_data(self, data: str) -> None:
        if not self.unseen:
            self.parts.append(data)


def _without_markup(html: str) -> str:
    parser = _Markup()
    parser.feed(html)
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
