# SPDX-License-Identifier: Apache-2.0
"""From documents to tokens, each document by itself.

A text begins with the begin-of-sequence token if the tokenizer puts one before a
prompt. The end-of-sequence token, if there is one, separates it from what follows. A
chat is what the model's chat template writes, which contains these tokens where the
model expects them; nothing is added to it.
"""

from collections.abc import Iterator, Sequence
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
        return list(self._tokens(source))

    def join(self, sources: Sequence[Source]) -> tuple[np.ndarray, list[int]]:
        """All documents' tokens in order, separated.

        Returns:
            int64 [tokens], and the number of tokens of each source's documents.

        Raises:
            CheckpointError: as ``tokens``.
        """
        parts: list[list[int]] = []
        counts = []
        separator: list[int] = []
        for source in sources:
            count = 0
            for ids in self._tokens(source):
                # One token may stand for both, the end of a text and its beginning.
                parts += [separator if ids[:1] != separator else [], ids]
                separator = []
                if source.kind == "text" and self._eos is not None:
                    separator = [self._eos]
                count += len(ids)
            counts.append(count)
        return np.concatenate([np.asarray(part, np.int64) for part in parts]), counts

    def _tokens(self, source: Source) -> Iterator[list[int]]:
        lead = [self.bos] if source.kind == "text" and self.bos is not None else []
        for start in range(0, len(source.documents), _BATCH):
            batch = source.documents[start : start + _BATCH]
            texts = [self._text(source, document) for document in batch]
            # `verbose=False`: no warning that a text is longer than the model's window.
            ids = self._tokenizer(texts, add_special_tokens=False, verbose=False)
            for document_ids in ids["input_ids"]:
                yield lead + list(document_ids)

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
