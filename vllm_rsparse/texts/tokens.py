# SPDX-License-Identifier: Apache-2.0
"""From documents to tokens, each document by itself.

A text begins with the begin-of-sequence token if the tokenizer puts one before a
prompt. The end-of-sequence token, if there is one, separates it from what follows. A
chat is what the model's chat template writes, which contains these tokens where the
model expects them; nothing is added to it.

The answers of a chat are what its assistant says. They are found in what the template
writes by their own text, in order, because templates may rewrite earlier turns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.texts.documents import Document, Source

# Documents that are given to the tokenizer at once; it splits them between threads.
_BATCH = 256
_TOKENIZER_FILES = ("tokenizer*", "tekken*", "vocab*", "*.model", "*.tiktoken")


def load_tokenizer(directory: Path) -> Any:
    """The checkpoint's tokenizer; CheckpointError if it cannot be loaded."""
    if not any(any(directory.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{directory}: has no tokenizer (none of {', '.join(_TOKENIZER_FILES)});"
            " copy the tokenizer's files of the same model there"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    # transformers raises whatever the tokenizer's own parser raised.
    except Exception as error:
        raise CheckpointError(
            f"{directory}: its tokenizer cannot be loaded"
            f" ({' '.join(str(error).split())}); copy the tokenizer's files of the same"
            " model there again"
        ) from error


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Tokens of joined documents.

    Attributes:
        ids: int64 [tokens].
        answers: bool [tokens], tokens of a chat's answers; all of a text, and of a chat
            in which no answer is found.
        counts: number of tokens of each source's documents.
    """

    ids: np.ndarray
    answers: np.ndarray
    counts: list[int]


class DocumentTokens:
    """Tokens of documents, by one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Attributes:
        bos: the begin-of-sequence token if prompts get one by default, else None.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._eos: int | None = getattr(tokenizer, "eos_token_id", None)
        bos = tokenizer.bos_token_id
        ids = tokenizer("a")["input_ids"]
        self.bos: int | None = bos if bos is not None and ids[:1] == [bos] else None

    def tokens(self, source: Source) -> list[list[int]]:
        """Tokens of each document, without what separates it from the next.

        Raises:
            CheckpointError: the model has no chat template, or it refuses a chat.
        """
        return [ids for ids, _ in self._tokens(source)]

    def join(self, sources: Sequence[Source]) -> TokenStream:
        """All documents' tokens in order, separated.

        Raises:
            CheckpointError: as ``tokens``.
        """
        parts: list[list[int]] = []
        answers: list[np.ndarray] = []
        counts = []
        separator: list[int] = []
        for source in sources:
            count = 0
            for ids, answered in self._tokens(source):
                # One token may stand for both, the end of a text and its beginning.
                between = separator if ids[:1] != separator else []
                parts += [between, ids]
                answers += [np.ones(len(between), bool), answered]
                separator = []
                if source.kind == "text" and self._eos is not None:
                    separator = [self._eos]
                count += len(ids)
            counts.append(count)
        joined = np.concatenate([np.asarray(part, np.int64) for part in parts])
        return TokenStream(joined, np.concatenate(answers), counts)

    def _tokens(self, source: Source) -> Iterator[tuple[list[int], np.ndarray]]:
        """Tokens of each document, and which of them are answers."""
        lead = [self.bos] if source.kind == "text" and self.bos is not None else []
        for start in range(0, len(source.documents), _BATCH):
            batch = source.documents[start : start + _BATCH]
            texts = [self._text(source, document) for document in batch]
            # `verbose=False`: no warning that a text is longer than the model's window.
            # Only tokenizers written in Rust know which characters a token stands for.
            located = source.kind == "messages" and self._tokenizer.is_fast
            more = {"return_offsets_mapping": True} if located else {}
            found = self._tokenizer(
                texts, add_special_tokens=False, verbose=False, **more
            )
            for number, ids in enumerate(found["input_ids"]):
                answered = np.ones(len(lead) + len(ids), bool)
                if located:
                    spans = answer_spans(batch[number], texts[number])
                    offsets = np.asarray(found["offset_mapping"][number])
                    if spans and len(ids):
                        answered[:] = _within(offsets.reshape(-1, 2), spans)
                yield lead + list(ids), answered

    def _text(self, source: Source, document: Document) -> str:
        if isinstance(document.content, str):
            return document.content
        if not getattr(self._tokenizer, "chat_template", None):
            raise CheckpointError(
                f'{source.where(document)}: has "messages", but the model has no chat'
                ' template; give its text under "text", or add chat_template.jinja to'
                " the model"
            )
        try:
            return self._tokenizer.apply_chat_template(
                document.content, tools=document.tools, tokenize=False
            )
        # Templates are programs: what they do not expect ends in any exception.
        except Exception as error:
            raise CheckpointError(
                f"{source.where(document)}: the model's chat template refuses the"
                f" chat ({error}); change its roles or leave the line out"
            ) from error


def answer_spans(document: Document, text: str) -> list[tuple[int, int]]:
    """Where a chat's answers are in what the template wrote, [first, last) characters.

    Args:
        document: a chat.
        text: what the template wrote of it.
    """
    spans = []
    position = 0
    for message in document.content:
        assert not isinstance(message, str)  # of a chat, each is a message
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            continue
        words = content.strip()  # templates strip what surrounds a message
        start = text.find(words, position)
        if start < 0:
            continue
        position = start + len(words)
        if message.get("role") == "assistant":
            spans.append((start, position))
    return spans


def _within(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens [tokens, 2], first and last character, lie in one of the spans."""
    inside = np.zeros(len(offsets), bool)
    for start, end in spans:
        inside |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return inside
