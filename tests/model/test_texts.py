# SPDX-License-Identifier: Apache-2.0
"""From text files to calibration windows."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.model.texts import (
    CalibrationText,
    choose_windows,
    load_tokenizer,
    read_texts,
)

VOCABULARY = 4096


@pytest.fixture(scope="module")
def tokenizer(pyllama: Path) -> Any:
    return load_tokenizer(pyllama)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text("".join(f"def f_{i}(x):\n    return x + {i}\n" for i in range(200)))
    return path


def _load(tokenizer: Any, *files: Path, **changes: Any) -> CalibrationText:
    settings = {"samples": 4, "tokens": 32, "seed": 0, "vocab_size": VOCABULARY}
    return choose_windows(tokenizer, read_texts(files), **(settings | changes))


def test_windows_are_distinct_stretches_of_the_joined_text(
    tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "ünï.txt"
    lines = [f"naïve café — 漢字 {i}\n" for i in range(40)]
    other.write_text("".join(lines), encoding="utf-8")
    text = _load(tokenizer, text_file, other, samples=20)
    joined: list[int] = []
    for file in (text_file, other):
        joined += tokenizer(file.read_text("utf-8"), add_special_tokens=False).input_ids
    slots = [tuple(joined[i : i + 32]) for i in range(0, len(joined) - 31, 32)]
    drawn = [tuple(row) for row in text.windows.tolist()]
    assert text.windows.shape == (20, 32)
    assert text.windows.dtype == torch.int64
    assert len(set(drawn)) == 20
    assert set(drawn) <= set(slots)


def test_the_seed_chooses_the_windows(tokenizer: Any, text_file: Path) -> None:
    first, again = _load(tokenizer, text_file), _load(tokenizer, text_file)
    assert torch.equal(first.windows, again.windows)
    other = _load(tokenizer, text_file, seed=1)
    assert not torch.equal(first.windows, other.windows)


def test_provenance_says_what_was_read(tokenizer: Any, text_file: Path) -> None:
    text = _load(tokenizer, text_file, seed=3)
    (source,) = text.provenance.pop("files")
    assert source["file"] == str(text_file)
    assert source["sha256"] == hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert source["tokens"] > 32 * 4
    assert text.provenance == {"samples": 4, "tokens": 32, "bos": False, "seed": 3}


def test_too_few_tokens_for_all_windows_is_a_warning(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("value = 1\n" * 30)
    with caplog.at_level(logging.WARNING):
        text = _load(tokenizer, path, samples=1000, tokens=16)
    assert 1 < len(text.windows) < 1000
    assert text.provenance["samples"] == len(text.windows)
    assert f"using {len(text.windows)}" in caplog.text


def test_a_begin_of_sequence_token_leads_where_prompts_get_one(
    tokenizer: Any, text_file: Path
) -> None:
    class WithBos:
        bos_token_id = tokenizer.bos_token_id

        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [self.bos_token_id] * add_special_tokens + ids}

    plain = _load(tokenizer, text_file, tokens=31)
    text = _load(WithBos(), text_file, tokens=32)
    assert (text.windows[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(text.windows[:, 1:], plain.windows)
    assert text.provenance["bos"] is True
    with pytest.raises(CheckpointError, match=r"--calibration-tokens 1 leaves no room"):
        _load(WithBos(), text_file, tokens=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"gone\.txt: cannot be read \(No such file"),
        (b"", r"gone\.txt: is empty"),
        (b" \n\t\n", r"gone\.txt: is empty"),
        (b"caf\xe9 au lait", r"gone\.txt: not UTF-8 text \(byte 3\)"),
        (b"ELF\0\0\0", r"gone\.txt: contains NUL bytes"),
        (b"x = 1\n", r"has \d tokens, fewer than one window of 32"),
    ],
    ids=["missing", "empty", "blank", "latin-1", "binary", "short"],
)
def test_unusable_text_is_refused(
    content: bytes | None, message: str, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "gone.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        _load(tokenizer, path)


def test_a_directory_is_no_text(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        _load(tokenizer, tmp_path)


def test_a_tokenizer_of_another_model(tokenizer: Any, text_file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"only 50; the tokenizer files belong"):
        _load(tokenizer, text_file, vocab_size=50)


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
