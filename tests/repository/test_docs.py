# SPDX-License-Identifier: Apache-2.0
"""Documentation: links, paths, commands, options and settings that it names exist."""

import argparse
import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from vllm_rsparse import envs
from vllm_rsparse.cli import COMMANDS
from vllm_rsparse.model.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    path
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "kernels/README.md",
        "deploy/**/README.md",
        "benchmarks/**/README.md",
    )
    for path in sorted(ROOT.glob(pattern))
]
# Named because they must not exist (test_packaging).
ABSENT = {"kernels/__init__.py", "kernels.py"}
BLOCK = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")

pages = pytest.mark.parametrize(
    "page", PAGES, ids=lambda path: str(path.relative_to(ROOT))
)


def prose(page: Path) -> str:
    """The page without its code blocks; a wrapped code span on one line."""
    text = BLOCK.sub("", page.read_text())
    return re.sub(r"(`[^`\n]*)\n\s*([^`\n]*`)", r"\1 \2", text)


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each command line in the page's code blocks."""
    for block in BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line.removeprefix("$ "), comments=True)
            except ValueError:  # a program's output
                continue
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                yield words


def spans(page: Path) -> list[str]:
    return SPAN.findall(prose(page))


@cache
def anchors(page: Path) -> set[str]:
    """What GitHub calls the page's headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
        for heading in headings
    }


@cache
def tracked() -> tuple[Path, ...]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return tuple(map(Path, listed.stdout.splitlines()))


def test_pages_are_found() -> None:
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert names > {"README.md", "CHANGELOG.md", "docs/index.md", "kernels/README.md"}


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pages
def test_relative_links_resolve(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@pages
def test_named_paths_exist(page: Path) -> None:
    """Relative to the root, to the package, or to the page's folder."""
    names = {path.name for path in tracked()}
    folders = (ROOT, ROOT / "vllm_rsparse", page.parent)
    for span in set(spans(page)) - ABSENT:
        if re.fullmatch(r"\w+\.(py|cpp|h)", span):
            assert span in names, span
        elif re.fullmatch(r"\w[\w.*-]*(/[\w.*-]+)*/?(\.py)?", span) and "/" in span:
            first = span.split("/")[0]
            bases = [folder for folder in folders if (folder / first).exists()]
            found = any(any(base.glob(span.rstrip("/"))) for base in bases)
            assert found or not bases, span


@pages
def test_tables_are_whole(page: Path) -> None:
    """A bar inside a cell, or a missing one, breaks the table where it is rendered."""
    rows = [
        re.sub(r"`[^`|]*`", "", line).replace("\\|", "").count("|")
        if line.startswith("|")
        else 0
        for line in BLOCK.sub("", page.read_text()).splitlines()
    ]
    for before, row in pairwise(rows):
        assert not (before and row) or before == row


@cache
def parser(command: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"vllm-rsparse {command}")
    importlib.import_module(COMMANDS[command][0]).add_arguments(made)
    return made


@pages
def test_commands_parse(page: Path) -> None:
    for words in commands(page):
        if Path(words[0]).name == "vllm-rsparse":
            parser(words[1]).parse_args(words[2:])


@pages
def test_options_in_prose_exist(page: Path) -> None:
    for span in spans(page):
        words = span.split()
        if words[0] == "vllm-rsparse" and len(words) > 1:
            known = parser(words[1]).format_help()
            for word in words[2:]:
                assert not word.startswith("--") or word in known, span


@pages
def test_scripts_have_the_options(page: Path) -> None:
    lines = [*commands(page), *(span.split() for span in spans(page))]
    for words in lines:
        if words[0] != "python" or len(words) < 2 or not words[1].endswith(".py"):
            continue
        script = (ROOT / words[1]).read_text()
        for word in words[2:]:
            assert not word.startswith("--") or f'"{word}"' in script, words


@pages
def test_make_targets_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines = [*commands(page), *(span.split() for span in spans(page))]
    for words in lines:
        if words[0] == "make" and len(words) > 1:
            assert words[1] in targets, words


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs/index.md"
    linked = {
        (index.parent / target.partition("#")[0]).resolve()
        for target in LINK.findall(prose(index))
    }
    assert {page for page in PAGES if page.is_relative_to(index.parent)} <= {
        index,
        *linked,
    }


def test_environment_variables_are_documented() -> None:
    named = {
        name
        for page in PAGES
        for name in re.findall(r"VLLM_RSPARSE_[A-Z_]+", page.read_text())
    }
    assert named == set(envs.VLLM_ENVIRONMENT)
    page = (ROOT / "docs/configuration.md").read_text()
    assert all(name in page for name in named)


def test_every_family_is_in_the_table_of_models() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    architectures = {name for family in FAMILIES for name in family.architectures}
    assert not {name for name in architectures if f"`{name}`" not in page}
