# SPDX-License-Identifier: Apache-2.0
"""What files of documents are read as, and what is refused, by line."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.texts.documents import Source, TextFile, read_sources

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def read(path: Path, content: bytes | str | None = None) -> Source:
    if isinstance(content, str):
        content = content.encode()
    if content is not None:
        path.write_bytes(content)
    (source,) = read_sources([path], "--data")
    return source


def lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    source = read(tmp_path / "a.txt", "def f():\n  return {}\n")
    assert source.kind == "text"
    assert [d.content for d in source.documents] == ["def f():\n  return {}\n"]
    # A byte order mark belongs to the encoding.
    assert read(tmp_path / "b.txt", "\ufeffabc").documents[0].content == "abc"


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.txt", "a"])
def test_json_lines_are_recognised_by_name_or_first_line(
    name: str, tmp_path: Path
) -> None:
    """Blank lines, CRLF, a byte order mark and other keys do not matter."""
    content = "\ufeff\n" + lines({"text": "a\nb\u2028c", "id": 7}, {"text": "d"})
    source = read(tmp_path / name, content.replace("}\n", "}\r\n\r\n"))
    assert [d.content for d in source.documents] == ["a\nb\u2028c", "d"]
    assert [d.line for d in source.documents] == [2, 4]


def test_chats(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    called = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    content = lines(
        {"messages": CHAT},
        {"prompt_id": "x", "messages": CHAT + called, "tools": tools},
    )
    source = read(tmp_path / "a.jsonl", content)
    assert source.kind == "messages"
    assert [d.content for d in source.documents] == [CHAT, CHAT + called]
    assert [d.tools for d in source.documents] == [None, tools]
    assert source.documents[1].to_json() == {
        "messages": CHAT + called,
        "tools": tools,
    }


def test_empty_texts_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        source = read(tmp_path / "a.jsonl", lines({"text": ""}, {"text": "a"}))
    assert [d.content for d in source.documents] == ["a"]
    assert "a.jsonl: 1 empty texts are left out" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, ": cannot be read (No such file"),
        (b"", ": is empty"),
        (b" \n\t\n", ": is empty"),
        (b"caf\xe9 au lait", ": not UTF-8 text (byte 3)"),
        (b"ELF\0\0\0", ": contains NUL bytes"),
        (b"PAR1\x15\x04", ": Parquet is not read; convert it to JSONL"),
        (lines({"text": "a"}) + "plain\n", ", line 2: not valid JSON"),
        (lines({"text": "a"}) + '{"text": "b', ", line 2: not valid JSON"),
        (lines({"text": "a"}, "b"), ", line 2: is 'b'; every line must be an object"),
        (lines({"text": "a"}, ["b"]), ", line 2: is ['b']; every line must"),
        (lines({"text": 3}), ", line 1: text must be a string, got 3"),
        (lines({"text": None}), ", line 1: text must be a string, got None"),
        (lines({"text": " "}, {"text": ""}), ": all its texts are empty"),
        (
            lines({"text": "a"}, {"conversations": [], "id": 1}),
            ', line 2: has neither "text" nor "messages", its keys are'
            " 'conversations', 'id'; rename",
        ),
        (lines({}), ", line 1: has neither"),
        (lines({"text": "a", "messages": CHAT}), ', line 1: has both "text" and'),
        (
            lines({"messages": CHAT}, {"text": "a"}),
            ', line 2: has "text", but line 1 has "messages"; put texts and chats',
        ),
        (
            "\n" + lines({"text": "a"}, {"messages": CHAT}),
            ', line 3: has "messages", but line 2 has "text"',
        ),
        (lines({"messages": []}), ", line 1: messages must be a list of at least one"),
        (lines({"messages": "hi"}), ", line 1: messages must be a list"),
        (lines({"messages": ["hi"]}), ", line 1: messages[0] must be an object"),
        (
            lines({"messages": [*CHAT, {"role": 1, "content": "a"}]}),
            ', line 1: messages[2].role must be a string such as "user", got 1',
        ),
        (lines({"messages": [{"content": "a"}]}), "messages[0].role must be a string"),
        (lines({"messages": [{"role": "user"}]}), "messages[0].content must be a str"),
        (
            lines({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
            "messages[0].content must be a string, got [{",
        ),
        (
            lines({"messages": CHAT, "tools": {"name": "f"}}),
            ", line 1: tools must be a list",
        ),
        (json.dumps([{"text": "a"}], indent=1), ": is one JSON document"),
        (json.dumps({"messages": CHAT}, indent=1), ": is one JSON document"),
        ("[" + lines({"text": "a"}) + "]", ": is one JSON document"),
        ("[" * 100_000, None),
        ("[1] Introduction\n", None),
        ("{ braces of another language }\n", None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused(
    content: bytes | str | None, message: str | None, tmp_path: Path
) -> None:
    """The message begins with the option and the file; texts that only look like JSON
    are texts."""
    path = tmp_path / "a.txt"
    if message is None:
        assert read(path, content).documents[0].content == content
        return
    with pytest.raises(CheckpointError) as caught:
        read(path, content)
    assert str(caught.value).startswith(f"--data {path}")
    assert message in str(caught.value)


def test_a_jsonl_name_with_plain_text_in_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"line 1: not valid JSON"):
        read(tmp_path / "a.jsonl", "plain text\n")


def test_a_directory_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path)


def test_weights_in_arguments(tmp_path: Path) -> None:
    assert TextFile.parse("a.txt") == TextFile(Path("a.txt"))
    assert TextFile.parse("a.txt=2") == TextFile(Path("a.txt"), 2.0)
    assert TextFile.parse("dir=1/a.txt=.5") == TextFile(Path("dir=1/a.txt"), 0.5)
    odd = tmp_path / "x=3"
    odd.write_text("a")
    assert TextFile.parse(str(odd)) == TextFile(odd)
    assert TextFile.parse(f"{odd}=2") == TextFile(odd, 2.0)
    for wrong in ("0", "-1", "nan", "inf", "", "two"):
        with pytest.raises(CheckpointError, match="must be a positive number"):
            TextFile.parse(f"a.txt={wrong}")


def test_either_all_files_have_a_weight_or_none(tmp_path: Path) -> None:
    file, other = tmp_path / "a.txt", tmp_path / "b.txt"
    file.write_text("a")
    other.write_text("b")
    first, second = read_sources([TextFile(file, 1), TextFile(other, 2)], "--data")
    assert (first.weight, second.weight) == (1, 2)
    with pytest.raises(CheckpointError, match=r"a\.txt: has no weight, but other"):
        read_sources([file, TextFile(other, 2)], "--data")


def test_a_file_does_not_count_twice(tmp_path: Path) -> None:
    file, link = tmp_path / "a.txt", tmp_path / "b.txt"
    file.write_text("a")
    link.symlink_to(file)
    with pytest.raises(CheckpointError, match=r"--data .*b\.txt: is given twice"):
        read_sources([file, link], "--data")
