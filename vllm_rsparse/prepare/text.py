# SPDX-License-Identifier: Apache-2.0
"""A run's calibration text: the user's, or what the model writes itself."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from vllm_rsparse.artifact.tensors import ARTIFACT_DIR
from vllm_rsparse.errors import PrepareError
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.options import DEFAULT_TOKENS, PrepareOptions
from vllm_rsparse.prepare.store.files import write_text
from vllm_rsparse.prepare.store.run_store import Key, RunStore
from vllm_rsparse.texts.documents import Document, Source
from vllm_rsparse.texts.tokens import load_tokenizer
from vllm_rsparse.texts.windows import CalibrationText, choose_windows
from vllm_rsparse.texts.writing import TextWriter, as_jsonl, as_source, writing_dtype

logger = logging.getLogger(__name__)

CALIBRATION_NAME = "calibration.jsonl"
_STAGE = "written"


class RunText(Protocol):
    """Where a run's windows come from."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the windows depend on, for the run's identity."""

    @property
    def calibration_tokens(self) -> int:
        """Tokens of all windows that calibrate."""

    def windows(self, store: RunStore, artifacts: Sequence[Path]) -> CalibrationText:
        """The windows.

        Args:
            store: keeps what is expensive to find again.
            artifacts: folders that get a copy of text that is no file of the user's.

        Raises:
            CheckpointError: the model cannot write text.
        """


@dataclass(frozen=True)
class GivenText:
    """Windows of the user's files."""

    text: CalibrationText

    @property
    def identity(self) -> Mapping[str, Any]:
        """Their digest."""
        found = {"calibration windows": _digest(self.text.windows)}
        if self.text.held_out is not None:
            found["held-out windows"] = _digest(self.text.held_out.ids)
        return found

    @property
    def calibration_tokens(self) -> int:
        """Those of the windows."""
        return self.text.windows.numel()

    def windows(self, store: RunStore, artifacts: Sequence[Path]) -> CalibrationText:
        """They are there already."""
        return self.text


@dataclass(frozen=True)
class WrittenText:
    """Windows of what the model writes.

    Attributes:
        writer: of the model.
        tokenizer: of the model.
        samples: number of windows.
        tokens: of each window.
        seed: of the text and of the windows.
        vocab_size: of the model.
        held_out: further windows, to measure on.
    """

    writer: TextWriter
    tokenizer: Any
    samples: int
    tokens: int
    seed: int
    vocab_size: int
    held_out: int = 0

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the text depends on; it is not written yet."""
        return {
            "the model's own text": self.writer.identity,
            "--calibration-samples": self.samples,
            "--calibration-tokens": self.tokens,
            "held-out windows": self.held_out,
        }

    @property
    def calibration_tokens(self) -> int:
        """As many as are asked for."""
        return self.samples * self.tokens

    def windows(self, store: RunStore, artifacts: Sequence[Path]) -> CalibrationText:
        """Let the model write, or recall what it wrote; the text is then a file of
        every artifact."""
        kept: list[list[Document]] = []
        while (batch := store.recall(Key(_STAGE, len(kept)))) is not None:
            kept.append([Document.from_json(value) for value in batch])
        documents: list[Document] = []
        count = (self.samples + self.held_out) * self.tokens
        batches = self.writer.batches(count, self.seed, kept)
        for index, batch in enumerate(batches):
            if index >= len(kept):
                values = [document.to_json() for document in batch]
                store.record({Key(_STAGE, index): values})
            documents += batch
        file = Path(ARTIFACT_DIR) / CALIBRATION_NAME
        text = self._choose(as_source(documents, file))
        for artifact in artifacts:
            write_text(artifact / CALIBRATION_NAME, as_jsonl(documents))
        return replace(
            text, provenance=text.provenance | {"written": self.writer.identity}
        )

    def _choose(self, source: Source) -> CalibrationText:
        return choose_windows(
            self.tokenizer,
            [source],
            self.samples,
            self.tokens,
            self.seed,
            self.vocab_size,
            self.held_out,
        )


def choose_text(
    options: PrepareOptions,
    sources: Sequence[Source],
    model: StreamedModel,
    stored: torch.dtype,
) -> RunText:
    """The text that a run calibrates on.

    Args:
        options: of the run.
        sources: the user's files; empty to let the model write.
        model: the base model.
        stored: dtype of the checkpoint's weights.

    Raises:
        CheckpointError: the model has no tokenizer, or the text has too few tokens.
        PrepareError: windows longer than the model's length.
    """
    tokenizer = load_tokenizer(model.checkpoint.directory)
    longest = model.config.get("max_position_embeddings")
    if sources:
        tokens = _window_tokens(options.tokens, DEFAULT_TOKENS, longest)
        return GivenText(
            choose_windows(
                tokenizer,
                sources,
                options.samples,
                tokens,
                options.seed,
                model.vocab_size,
                options.held_out(tokens),
            )
        )
    dtype = writing_dtype(stored, model.dtype, model.device)
    writer = TextWriter(model.checkpoint, tokenizer, model.device, dtype)
    tokens = _window_tokens(options.tokens, writer.window, longest)
    return WrittenText(
        writer,
        tokenizer,
        options.samples,
        tokens,
        options.seed,
        model.vocab_size,
        options.held_out(tokens),
    )


def _digest(windows: torch.Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def _window_tokens(tokens: int | None, default: int, longest: int | None) -> int:
    if tokens is None:
        return min(default, longest) if longest else default
    if longest and tokens > longest:
        raise PrepareError(
            f"--calibration-tokens {tokens} is more than the model's length of"
            f" {longest} (max_position_embeddings)"
        )
    return tokens
