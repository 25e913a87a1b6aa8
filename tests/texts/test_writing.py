# SPDX-License-Identifier: Apache-2.0
"""Calibration text that the model writes: bounded, repeatable, usable again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.loading import loaded_bytes
from vllm_rsparse.testing.quantized import write_quantized
from vllm_rsparse.texts import writing
from vllm_rsparse.texts.documents import Document, read_sources
from vllm_rsparse.texts.seeds import SEEDS, seed_prompts
from vllm_rsparse.texts.tokens import DocumentTokens, load_tokenizer
from vllm_rsparse.texts.writing import (
    TextWriter,
    as_jsonl,
    as_source,
    write_calibration,
)

CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = replace(writing.PACES["cpu"], batch=2, answer=6)
    monkeypatch.setitem(writing.PACES, "cpu", pace)


@pytest.fixture
def chat_model(pyllama: Path, tmp_path: Path) -> Path:
    """The reference model with a chat template."""
    directory = tmp_path / "chat"
    shutil.copytree(pyllama, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def write(model: Path, tokens: int, seed: int = 0) -> list[Document]:
    return write_calibration(Checkpoint(model), CPU, torch.float32, tokens, seed)


def count(model: Path, documents: list[Document]) -> int:
    texts = DocumentTokens(load_tokenizer(model))
    return sum(map(len, texts.tokens(as_source(documents))))


def seeds(key: str) -> list[str]:
    lines = map(json.loads, SEEDS.read_text(encoding="utf-8").splitlines())
    return [line[key] for line in lines if key in line]


def test_the_seeds_cover_the_domains_evenly() -> None:
    lines = [json.loads(line) for line in SEEDS.read_text("utf-8").splitlines()]
    for key, least in (("prompt", 16), ("start", 8)):
        domains = [line["domain"] for line in lines if key in line]
        assert len(set(seeds(key))) == len(domains)
        assert {domains.count(domain) for domain in domains} == {least}
        assert {"code", "math", "prose", "languages"} <= set(domains)
        # Any part of them has several domains.
        assert len({*seed_prompts(key)[:5]} & {*seeds(key)[:least]}) == 1


def test_a_model_without_chat_template_continues(pyllama: Path) -> None:
    documents = write(pyllama, 100)
    assert {document.kind for document in documents} == {"text"}
    starts = seeds("start")
    assert all(str(d.content).startswith(tuple(starts)) for d in documents)
    assert 100 <= count(pyllama, documents) < 300


def test_a_model_with_chat_template_answers(chat_model: Path, tmp_path: Path) -> None:
    """The file can be given as calibration data: the same documents are read."""
    documents = write(chat_model, 100)
    prompts = seeds("prompt")
    for document in documents:
        user, assistant = document.content
        assert isinstance(user, dict)
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"] in prompts
        assert assistant["content"].strip()
    file = tmp_path / "own.jsonl"
    file.write_text(as_jsonl(documents), encoding="utf-8")
    (source,) = read_sources([file], "--calibration-data")
    assert [d.content for d in source.documents] == [d.content for d in documents]
    assert source.sha256 == as_source(documents).sha256


def test_the_seed_decides_and_the_callers_generator_is_untouched(
    pyllama: Path,
) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = write(pyllama, 60)
    assert torch.equal(torch.rand(1), expected)
    assert write(pyllama, 60) == first
    assert write(pyllama, 60, seed=1) != first


def test_kept_batches_are_not_written_again(
    pyllama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(pyllama)
    writer = TextWriter(checkpoint, load_tokenizer(pyllama), CPU, torch.float32)
    batches = [*writer.batches(200, 0)]
    assert len(batches) > 2
    written = []
    original = TextWriter._write

    def counted(self: TextWriter, prompts: Any, seed: int, index: int) -> Any:
        written.append(index)
        return original(self, prompts, seed, index)

    monkeypatch.setattr(TextWriter, "_write", counted)
    assert [*writer.batches(200, 0, batches[:2])] == batches
    assert written == [*range(2, len(batches))]


def test_further_rounds_write_other_text(
    pyllama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "seed_prompts", lambda key: ("def f(", "class A"))
    documents = write(pyllama, 50)
    assert len(documents) > 4
    texts = [document.content for document in documents]
    assert len({*texts}) == len(texts)


def test_a_model_that_writes_nothing(
    pyllama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(self: TextWriter, prompts: Any, seed: int, index: int) -> Any:
        return []

    monkeypatch.setattr(TextWriter, "_write", nothing)
    with pytest.raises(CheckpointError, match=r"wrote 0 tokens in 8 rounds.*--calibr"):
        write(pyllama, 10)


def test_a_model_that_does_not_fit(
    pyllama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "free_memory", lambda device: 1 << 20)
    message = (
        r"\d\.\d MiB in torch.float32, and \d\.\d MiB are free \(cpu\); give text with"
    )
    with pytest.raises(CheckpointError, match=message):
        write(pyllama, 10)


def test_a_template_that_refuses(chat_model: Path) -> None:
    template = "{{ raise_exception('no users') }}"
    (chat_model / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=r"refuses the messages .*give text with"):
        write(chat_model, 10)


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint's own, but on a CPU only if it computes in it."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cuda = torch.device("cuda")
    for native in (True, False):
        monkeypatch.setattr(
            torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda native=native: native
        )
        assert writing.writing_dtype(bf16, fp32, CPU) == (bf16 if native else fp32)
        assert writing.writing_dtype(fp16, fp32, CPU) == fp32
        assert writing.writing_dtype(fp16, fp16, cuda) == fp16


def test_a_quantized_checkpoint_writes(pyllama: Path, tmp_path: Path) -> None:
    """transformers cannot run it; its dequantised weights are loaded."""
    directory = tmp_path / "q"
    write_quantized(pyllama, directory, "w4a16-asym-g32")
    checkpoint = Checkpoint(directory)
    plain = loaded_bytes(Checkpoint(pyllama), torch.bfloat16)
    assert loaded_bytes(checkpoint, torch.bfloat16) == plain
    assert write(directory, 20)
