# SPDX-License-Identifier: Apache-2.0
"""Held-out text: files -> tokens -> consecutive windows."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_rsparse.errors import CheckpointError


@dataclass(frozen=True)
class HeldOutText:
    """Windows of text and where they come from.

    Attributes:
        windows: int64 [windows, positions].
        files: path, sha256 and number of tokens of each file.
        available: windows that the text has; more than ``windows`` where they were
            limited.
    """

    windows: Tensor
    files: list[dict[str, Any]]
    available: int


def read_windows(
    tokenizer: Any, files: Sequence[Path], window: int, limit: int | None
) -> HeldOutText:
    """Cut the files' joined tokens into windows; an incomplete last one is dropped.

    If the tokenizer puts a begin-of-sequence token before a prompt, every window starts
    with it too.

    Args:
        tokenizer: a Hugging Face tokenizer.
        files: UTF-8 text files.
        window: positions of a window.
        limit: at most this many windows, spread evenly over the text; None takes all.

    Raises:
        CheckpointError: a file is not text, or the text is shorter than one window.
    """
    sources = []
    parts = []
    for file in files:
        data = file.read_bytes()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"--data {file}: not UTF-8 text (byte {error.start}); convert it, or"
                " leave it out"
            ) from error
        # `verbose=False`: no warning that the text is longer than the model's window.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        digest = hashlib.sha256(data).hexdigest()
        sources.append({"file": str(file), "sha256": digest, "tokens": len(ids)})
        parts.append(np.asarray(ids, dtype=np.int64))
    stream = np.concatenate(parts)
    prefix = _prefix(tokenizer)
    body = window - len(prefix)
    available = len(stream) // body if body > 0 else 0
    if available == 0:
        raise CheckpointError(
            f"--data has {len(stream)} tokens, fewer than one window of {window};"
            " give more text or a smaller --window"
        )
    count = available if limit is None else min(limit, available)
    chosen = np.linspace(0, available - 1, count).astype(int)
    cut = [np.append(prefix, stream[i * body : (i + 1) * body]) for i in chosen]
    windows = torch.from_numpy(np.stack(cut)).long()
    return HeldOutText(windows, sources, available)


def _prefix(tokenizer: Any) -> list[int]:
    """The begin-of-sequence token where prompts get one by default."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids and ids[0] == bos else []
