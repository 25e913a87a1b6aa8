# SPDX-License-Identifier: Apache-2.0
"""Chats as the model's own template writes them."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.texts.documents import Source, read_sources
from vllm_rsparse.texts.tokens import DocumentTokens, load_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if tools %}{{ tools | length }} tools{% endif %}"
)


@pytest.fixture
def tokenizer(pyllama: Path) -> Any:
    tokenizer = load_tokenizer(pyllama)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def source(path: Path, *chats: Any) -> Source:
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (read,) = read_sources([path], "--data")
    return read


def chat(*contents: str, roles: tuple[str, ...] = ("user", "assistant")) -> Any:
    turns = zip(roles * len(contents), contents, strict=False)
    return {"messages": [{"role": r, "content": c} for r, c in turns]}


def test_the_template_writes_chats_and_nothing_is_added(
    tokenizer: Any, tmp_path: Path
) -> None:
    chats = [chat("a", "b", "c"), chat("x") | {"tools": [{"name": "f"}, {}]}]
    read = source(tmp_path / "a.jsonl", *chats)
    written = [
        "<s>user: a</s>\n<s>assistant: b</s>\n<s>user: c</s>\n",
        "<s>user: x</s>\n2 tools",
    ]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in written]
    texts = DocumentTokens(tokenizer)
    assert texts.tokens(read) == ids
    stream = texts.join([read])
    assert stream.ids.tolist() == ids[0] + ids[1]
    assert stream.counts == [len(stream.ids)]
    # <s> and </s> are the special tokens, not characters.
    assert ids[0][0] == tokenizer.bos_token_id
    assert ids[0].count(tokenizer.eos_token_id) == 3


def test_a_text_after_a_chat_and_a_chat_after_a_text(
    tokenizer: Any, tmp_path: Path
) -> None:
    """Only what follows a text is separated from it: a chat has its own end."""
    talk = source(tmp_path / "a.jsonl", chat("a"))
    text = source(tmp_path / "b.jsonl", {"text": "x = 1"})
    texts = DocumentTokens(tokenizer)
    (chat_ids,), (text_ids,) = texts.tokens(talk), texts.tokens(text)
    stream = texts.join([talk, text, talk])
    # The template begins with <s>, which is not the separator </s>.
    assert stream.ids.tolist() == [
        *(chat_ids + text_ids),
        *(tokenizer.eos_token_id, *chat_ids),
    ]


def test_one_token_that_ends_and_begins_is_not_doubled(
    tokenizer: Any, tmp_path: Path
) -> None:
    class Same:
        bos_token_id = eos_token_id = 1

        def __call__(self, text: Any, add_special_tokens: bool = True, **_: Any) -> Any:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    read = source(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    a, b = (tokenizer(x, add_special_tokens=False).input_ids for x in "ab")
    stream = DocumentTokens(Same()).join([read])
    assert stream.ids.tolist() == [1, *a, 1, *b]


def test_a_model_without_chat_template(pyllama: Path, tmp_path: Path) -> None:
    texts = DocumentTokens(load_tokenizer(pyllama))
    with pytest.raises(CheckpointError, match=r"a\.jsonl, line 1: has .messages., bu"):
        texts.tokens(source(tmp_path / "a.jsonl", chat("a")))


def test_a_chat_that_the_template_refuses(tokenizer: Any, tmp_path: Path) -> None:
    read = source(tmp_path / "a.jsonl", chat("a"), chat("b", roles=("system",)))
    message = r"a\.jsonl, line 2: the model's chat template refuses .*Only user and"
    with pytest.raises(CheckpointError, match=message):
        DocumentTokens(tokenizer).tokens(read)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no tokenizer") as caught:
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded") as torn:
        load_tokenizer(tmp_path)
    for error in (caught, torn):
        assert "\n" not in str(error.value)


def test_the_answers_of_a_chat(tokenizer: Any, tmp_path: Path) -> None:
    """Found by their own text, whatever the template writes around it."""
    repeated = chat("say yes", "yes", "say yes no", "yes no ")
    read = source(tmp_path / "a.jsonl", repeated, chat("a"))
    tokenizer.chat_template = TEMPLATE.replace("m.content", "m.content | trim")
    stream = DocumentTokens(tokenizer).join([read])
    kept = [tokenizer.decode(stream.ids[i]) for i in stream.answers.nonzero()[0]]
    first = "".join(kept[: stream.answers[: stream.counts[0]].sum()])
    # A chat without an answer counts whole, as a text does.
    assert first.split() == ["yes", "yes", "no<s>user:", "a</s>"]
    text = source(tmp_path / "b.jsonl", {"text": "a"}, {"text": "b"})
    assert DocumentTokens(tokenizer).join([text]).answers.all()
