# SPDX-License-Identifier: Apache-2.0
"""Calibration text: files -> tokens -> a seeded choice of windows."""

import hashlib
import logging
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_rsparse.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceText:
    """One file's text and the digest of its bytes."""

    file: Path
    text: str
    sha256: str


@dataclass(frozen=True)
class CalibrationText:
    """Token windows and where they come from.

    Attributes:
        windows: int64 [samples, tokens], in random order.
        provenance: files with their digests, counts, and whether a window starts with
            the begin-of-sequence token.
    """

    windows: Tensor
    provenance: dict[str, Any]


def read_texts(files: Iterable[Path]) -> list[SourceText]:
    """Read UTF-8 files.

    Raises:
        CheckpointError: a file is missing, empty or not text.
    """
    return [_read_text(file) for file in files]


def choose_windows(
    tokenizer: Any,
    texts: Iterable[SourceText],
    samples: int,
    tokens: int,
    seed: int,
    vocab_size: int,
) -> CalibrationText:
    """Draw non-overlapping windows of tokens from texts.

    The texts' tokens are joined in the given order and cut into windows; ``samples`` of
    them are drawn without replacement. If the tokenizer puts a begin-of-sequence token
    before a prompt, every window starts with it too, as in serving.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: what to draw from.
        samples: number of windows; fewer, with a warning, if the text is too short.
        tokens: tokens per window.
        seed: chooses the windows.
        vocab_size: of the model, to detect the tokenizer of another model.

    Raises:
        CheckpointError: the texts together are shorter than one window, or the
            tokenizer is not the model's.
    """
    parts = []
    sources = []
    for source in texts:
        # `verbose=False`: no warning that the text is longer than the model's window.
        ids = tokenizer(source.text, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        sources.append(
            {"file": str(source.file), "sha256": source.sha256, "tokens": len(ids)}
        )
        parts.append(np.asarray(ids, dtype=np.int64))
    stream = np.concatenate(parts)
    bos = _leading_token(tokenizer)
    prefix = [] if bos is None else [bos]
    body = tokens - len(prefix)
    if body < 1:
        raise CheckpointError(
            f"--calibration-tokens {tokens} leaves no room for text after the"
            " begin-of-sequence token; use 2 or more"
        )
    available = len(stream) // body
    if available == 0:
        raise CheckpointError(
            f"--calibration-data has {len(stream)} tokens, fewer than one window of"
            f" {tokens}; give more text or lower --calibration-tokens"
        )
    if available < samples:
        logger.warning(
            "calibration text has %d tokens, enough for %d of the %d windows of %d"
            " tokens requested: using %d; more text gives better thresholds",
            len(stream),
            available,
            samples,
            tokens,
            available,
        )
        samples = available
    # Ranked by random(), the one generator whose sequence Python guarantees to stay the
    # same from version to version.
    generator = random.Random(seed)
    draws = [generator.random() for _ in range(available)]
    chosen = sorted(range(available), key=draws.__getitem__)[:samples]
    cut = [np.append(prefix, stream[i * body : (i + 1) * body]) for i in chosen]
    windows = torch.from_numpy(np.stack(cut)).long()
    if int(windows.max()) >= vocab_size:
        raise CheckpointError(
            f"the tokenizer gives token {int(windows.max())}, but the model has only"
            f" {vocab_size}; the tokenizer files belong to another model"
        )
    return CalibrationText(
        windows,
        {
            "files": sources,
            "samples": samples,
            "tokens": tokens,
            "bos": bos is not None,
            "seed": seed,
        },
    )


def load_tokenizer(directory: Path) -> Any:
    """The checkpoint's tokenizer; CheckpointError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    # transformers raises whatever the tokenizer's own parser raised.
    except Exception as error:
        raise CheckpointError(
            f"{directory}: its tokenizer cannot be loaded ({error}); the directory"
            " needs the tokenizer's files next to the weights"
        ) from error


def _read_text(file: Path) -> SourceText:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"--calibration-data {file}: cannot be read ({error.strerror})"
        ) from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"--calibration-data {file}: not UTF-8 text (byte {error.start}); convert"
            " it, or leave it out"
        ) from error
    if "\0" in text:
        raise CheckpointError(
            f"--calibration-data {file}: contains NUL bytes, so it is not text;"
            " leave it out"
        )
    if not text.strip():
        raise CheckpointError(f"--calibration-data {file}: is empty; leave it out")
    return SourceText(file, text, hashlib.sha256(data).hexdigest())


def _leading_token(tokenizer: Any) -> int | None:
    """The begin-of-sequence token if prompts get one by default, else None."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and ids and ids[0] == bos else None
