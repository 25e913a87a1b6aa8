# SPDX-License-Identifier: Apache-2.0
"""The reader of JSON files that every room shares."""

from pathlib import Path

import pytest

from vllm_rsparse.errors import SettingError
from vllm_rsparse.validation import read_json

REMEDY = "; write it again"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, r"cannot be read \(No such file or directory\)"),
        ("folder", r"cannot be read \(Is a directory\)"),
        (b'{"a": "\xff"}', r"cannot be read \(not UTF-8 text, byte 7\)"),
        (b"{", r"not valid JSON \(Expecting property name"),
        (b'{"a": NaN}', r"not valid JSON \(a value is NaN"),
        (b"[1]", r"expected a JSON object, got \[1\]"),
    ],
)
def test_a_fault_names_the_file_what_was_found_and_what_to_do(
    content: bytes | str | None, found: str, tmp_path: Path
) -> None:
    file = tmp_path / "some.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.mkdir()
    with pytest.raises(SettingError, match=rf"^{file}: {found}.*{REMEDY}$") as error:
        read_json(file, SettingError, REMEDY)
    assert str(error.value).count(str(file)) == 1
    with pytest.raises(SettingError, match=f"^--option: {found}"):
        read_json(file, SettingError, REMEDY, "--option")


def test_an_object(tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    file.write_text('{"a": "ü"}', encoding="utf-8")
    assert read_json(file, SettingError, REMEDY) == {"a": "ü"}
