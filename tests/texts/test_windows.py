# SPDX-License-Identifier: Apache-2.0
"""From documents to windows."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.texts.documents import TextFile, read_sources
from vllm_rsparse.texts.tokens import load_tokenizer
from vllm_rsparse.texts.windows import CalibrationText, choose_windows, spread_windows

VOCABULARY = 4096
OPTION = "--calibration-data"
EOS = 1  # of the reference model


@pytest.fixture(scope="module")
def tokenizer(pyllama: Path) -> Any:
    return load_tokenizer(pyllama)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text("".join(f"def f_{i}(x):\n    return x + {i}\n" for i in range(200)))
    return path


def _load(tokenizer: Any, *files: Path | TextFile, **changes: Any) -> CalibrationText:
    settings = {"samples": 4, "tokens": 32, "seed": 0, "vocab_size": VOCABULARY}
    sources = read_sources(files, OPTION)
    return choose_windows(tokenizer, sources, **(settings | changes))


def test_windows_are_distinct_stretches_of_the_joined_text(
    tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "ünï.txt"
    lines = [f"naïve café — 漢字 {i}\n" for i in range(40)]
    other.write_text("".join(lines), encoding="utf-8")
    text = _load(tokenizer, text_file, other, samples=20)
    first, second = (
        tokenizer(file.read_text("utf-8"), add_special_tokens=False).input_ids
        for file in (text_file, other)
    )
    joined = [*first, EOS, *second]
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
    assert (source["kind"], source["documents"]) == ("text", 1)
    assert "weight" not in source
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


class WithBos:
    """A tokenizer that puts a begin-of-sequence token before a prompt."""

    bos_token_id, eos_token_id = 0, EOS

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(
        self, text: str | list[str], add_special_tokens: bool = True, **_: Any
    ) -> Any:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not add_special_tokens:
            return {"input_ids": ids}
        assert isinstance(text, str)
        return {"input_ids": [self.bos_token_id, *ids]}


def test_a_begin_of_sequence_token_leads_where_prompts_get_one(
    tokenizer: Any, text_file: Path
) -> None:
    plain = _load(tokenizer, text_file, tokens=31)
    text = _load(WithBos(tokenizer), text_file, tokens=32)
    assert (text.windows[:, 0] == WithBos.bos_token_id).all()
    assert torch.equal(text.windows[:, 1:], plain.windows)
    assert text.provenance["bos"] is True
    with pytest.raises(CheckpointError, match=r"--calibration-tokens 1 leaves no room"):
        _load(WithBos(tokenizer), text_file, tokens=1)
    with pytest.raises(CheckpointError, match=r"fewer than one window of 1;"):
        spread_windows(WithBos(tokenizer), read_sources([text_file], "--data"), 1, None)


def _jsonl(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_documents_are_separated_in_windows(tokenizer: Any, tmp_path: Path) -> None:
    """Tokenised each by itself, with the end token between them, and BOS where used."""
    texts = ["x = 1", " y", "return z\n"]
    file = _jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    joined = [*ids[0], EOS, *ids[1], EOS, *ids[2]]
    text = _load(tokenizer, file, samples=1, tokens=len(joined))
    assert text.windows.tolist() == [joined]
    assert text.provenance["files"][0]["documents"] == 3
    assert text.provenance["files"][0]["tokens"] == len(joined) - 2
    joined = [0, *ids[0], EOS, 0, *ids[1], EOS, 0, *ids[2]]
    text = _load(WithBos(tokenizer), file, samples=1, tokens=len(joined))
    assert text.windows.tolist() == [joined]
    # A window that begins with a document does not begin with two such tokens.
    cut = 1 + len(ids[0]) + 1
    windows = spread_windows(
        WithBos(tokenizer), read_sources([file], "--data"), cut, None
    ).windows
    assert windows[0].tolist() == joined[:cut]
    assert windows[1].tolist() == joined[cut : 2 * cut]


def test_weights_are_shares_of_the_windows(tokenizer: Any, tmp_path: Path) -> None:
    """Whatever the files' sizes, and in any leading part of the windows."""
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_text("a = 1\n" * 100)
    large.write_text("zeta.update(omega)\n" * 1000)
    only = set(_load(tokenizer, small).windows.unique().tolist())
    text = _load(tokenizer, TextFile(small, 6), TextFile(large, 2.0), samples=8)
    from_small = [set(window) <= only for window in text.windows.tolist()]
    assert sum(from_small) == 6
    assert sum(from_small[:4]) == 3
    assert [file["weight"] for file in text.provenance["files"]] == [6, 2.0]
    assert len({tuple(window) for window in text.windows[:, :8].tolist()}) > 2


def test_a_weight_that_gives_no_window(
    tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.py"
    other.write_bytes(text_file.read_bytes())
    files = TextFile(text_file, 100), TextFile(other, 1)
    with pytest.raises(CheckpointError, match=r"gives it 0\.04 of 4 windows, so none"):
        _load(tokenizer, *files)


def test_a_weighted_file_that_is_too_short(
    tokenizer: Any, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("value = 1\n" * 12)
    files = TextFile(text_file, 1), TextFile(short, 1)
    with caplog.at_level(logging.WARNING):
        text = _load(tokenizer, *files, tokens=16)
    assert len(text.windows) == 4
    assert caplog.text == ""
    text = _load(tokenizer, *files, samples=64, tokens=16)
    assert "short.txt has" in caplog.text
    assert 32 < len(text.windows) < 64
    with pytest.raises(CheckpointError, match=r"short\.txt has \d+ tokens, fewer than"):
        _load(tokenizer, *files, tokens=100)


def test_too_short_for_one_window(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x = 1\n")
    with pytest.raises(CheckpointError, match=r"has \d tokens, fewer than one window"):
        _load(tokenizer, path)


def test_held_out_windows_are_spread_over_the_text(
    tokenizer: Any, text_file: Path
) -> None:
    sources = read_sources([text_file], "--data")
    everything = spread_windows(tokenizer, sources, 32, None)
    some = spread_windows(tokenizer, sources, 32, 3)
    assert some.available == everything.available == len(everything.windows)
    middle = (everything.available - 1) // 2
    assert torch.equal(some.windows, everything.windows[[0, middle, -1]])


def test_a_tokenizer_of_another_model(tokenizer: Any, text_file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"only 50; the tokenizer files belong"):
        _load(tokenizer, text_file, vocab_size=50)
