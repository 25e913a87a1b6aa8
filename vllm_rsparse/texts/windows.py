# SPDX-License-Identifier: Apache-2.0
"""From documents to windows of equal length.

The documents are joined in the given order and cut: several short documents share a
window, and a long one continues in the next. If the tokenizer puts a begin-of-sequence
token before a prompt, every window starts with it, as in serving.
"""

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.texts.documents import Source
from vllm_rsparse.texts.tokens import DocumentTokens, TokenStream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationText:
    """Token windows and where they come from.

    Attributes:
        windows: int64 [samples, tokens], in random order.
        provenance: files with their digests, counts, and whether a window starts with
            the begin-of-sequence token.
        held_out: windows of the same text that are not among these; None where none
            were asked for.
    """

    windows: Tensor
    provenance: dict[str, Any]
    held_out: "AnsweredWindows | None" = None


@dataclass(frozen=True, eq=False)
class AnsweredWindows:
    """Windows of text in which it is known what a model would write.

    Attributes:
        ids: int64 [windows, tokens].
        answers: bool [windows, tokens], see ``TokenStream``.
    """

    ids: Tensor
    answers: Tensor


@dataclass(frozen=True)
class HeldOutText:
    """Windows of text and where they come from.

    Attributes:
        windows: int64 [windows, positions].
        files: path, digest and counts of each file.
        available: windows that the text has; more than ``windows`` where they were
            limited.
    """

    windows: Tensor
    files: list[dict[str, Any]]
    available: int


def choose_windows(
    tokenizer: Any,
    sources: Sequence[Source],
    samples: int,
    tokens: int,
    seed: int,
    vocab_size: int,
    held_out: int = 0,
) -> CalibrationText:
    """Draw non-overlapping windows without replacement.

    Without weights they are drawn from all sources joined. With weights, each source
    has its own windows and gives its share of them; sources take turns, so that any
    leading part of the result has about the same shares.

    Args:
        tokenizer: a Hugging Face tokenizer.
        sources: what to draw from; all have a weight, or none has.
        samples: number of windows; fewer, with a warning, if the text is too short.
        tokens: tokens per window.
        seed: chooses the windows.
        vocab_size: of the model, to detect the tokenizer of another model.
        held_out: number of further windows to measure on, at least; at most a third of
            a text that is too short for all. The calibration windows are the same
            without them, if the text is long enough.

    Raises:
        CheckpointError: there are too few windows, a source has no share, a chat
            cannot be written, or the tokenizer is not the model's.
    """
    texts = DocumentTokens(tokenizer)
    if tokens <= (texts.bos is not None):
        raise CheckpointError(
            f"--calibration-tokens {tokens} leaves no room for text after the"
            " begin-of-sequence token; use 2 or more"
        )
    weighted = sources[0].weight is not None
    groups = [[source] for source in sources] if weighted else [list(sources)]
    shares = _shares(sources, samples) if weighted else [samples]
    # random() is the one generator whose sequence Python guarantees to stay the same
    # from version to version.
    generator = random.Random(seed)
    drawn: list[tuple[float, np.ndarray]] = []
    spare: list[tuple[np.ndarray, np.ndarray]] = []
    files = []
    for group, share in zip(groups, shares, strict=True):
        stream = texts.join(group)
        cut = _cut(stream, tokens, texts.bos)
        name = group[0].name if weighted else "--calibration-data"
        if len(cut) < 1 + bool(held_out):
            few = "two windows" if held_out else "one window"
            raise CheckpointError(
                f"{name} has {len(stream.ids)} tokens, fewer than {few} of {tokens};"
                " give more text or lower --calibration-tokens"
            )
        aside = math.ceil(held_out * share / samples)
        if len(cut) < share + aside:
            aside = min(aside, max(1, len(cut) // 3)) if held_out else 0
        if len(cut) < share + aside:
            logger.warning(
                "%s has %d tokens, enough for %d of the %d windows of %d tokens"
                " requested: using %d; more text gives better thresholds",
                name,
                len(stream.ids),
                len(cut),
                share + aside,
                tokens,
                len(cut) - aside,
            )
            share = len(cut) - aside
        draws = [generator.random() for _ in cut]
        ranked = sorted(range(len(cut)), key=draws.__getitem__)
        drawn += [((i + 0.5) / share, cut[j][0]) for i, j in enumerate(ranked[:share])]
        spare += [cut[j] for j in ranked[share : share + aside]]
        files += _described(group, stream.counts)
    drawn.sort(key=lambda window: window[0])  # stable: among equals, the first source
    windows = torch.from_numpy(np.stack([window for _, window in drawn]))
    _check_vocabulary(windows, vocab_size)
    provenance = {
        "files": files,
        "samples": len(windows),
        "tokens": tokens,
        "bos": texts.bos is not None,
        "seed": seed,
    }
    if not spare:
        return CalibrationText(windows, provenance)
    ids, answers = (
        torch.from_numpy(np.stack(part)) for part in zip(*spare, strict=True)
    )
    return CalibrationText(
        windows, provenance | {"held_out": len(ids)}, AnsweredWindows(ids, answers)
    )


def spread_windows(
    tokenizer: Any, sources: Sequence[Source], window: int, limit: int | None
) -> HeldOutText:
    """Consecutive windows of all sources joined; an incomplete last one is dropped.

    Args:
        tokenizer: a Hugging Face tokenizer.
        sources: what to read.
        window: positions of a window.
        limit: at most this many windows, spread evenly over the text; None takes all.

    Raises:
        CheckpointError: the text is shorter than one window, or a chat cannot be
            written.
    """
    texts = DocumentTokens(tokenizer)
    stream = texts.join(sources)
    enough = window > (texts.bos is not None)
    cut = _cut(stream, window, texts.bos) if enough else []
    if not cut:
        raise CheckpointError(
            f"--data has {len(stream.ids)} tokens, fewer than one window of {window};"
            " give more text or a smaller --window"
        )
    count = len(cut) if limit is None else min(limit, len(cut))
    chosen = np.linspace(0, len(cut) - 1, count).astype(int)
    windows = torch.from_numpy(np.stack([cut[i][0] for i in chosen]))
    return HeldOutText(windows, _described(sources, stream.counts), len(cut))


def _cut(
    stream: TokenStream, tokens: int, bos: int | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Consecutive windows, ids and answers [tokens], led by ``bos`` unless None."""
    windows: list[tuple[np.ndarray, np.ndarray]] = []
    start = 0
    while True:
        lead = [] if bos is None or stream.ids[start] == bos else [bos]
        end = start + tokens - len(lead)
        if end > len(stream.ids):
            return windows
        ids = np.append(np.asarray(lead, np.int64), stream.ids[start:end])
        answers = np.append(np.zeros(len(lead), bool), stream.answers[start:end])
        windows.append((ids, answers))
        if end == len(stream.ids):
            return windows
        start = end


def _shares(sources: Sequence[Source], samples: int) -> list[int]:
    """Windows of each source, in proportion to the weights.

    Each gets the whole part of its share, and those with the largest remainders get
    another until all are given.
    """
    total = sum(source.weight or 0 for source in sources)
    exact = [samples * (source.weight or 0) / total for source in sources]
    shares = [math.floor(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in order[: samples - sum(shares)]:
        shares[i] += 1
    for source, share, wanted in zip(sources, shares, exact, strict=True):
        if share == 0:
            raise CheckpointError(
                f"{source.name}: its weight gives it {wanted:.2f} of {samples} windows,"
                " so none; raise its weight or --calibration-samples, or leave it out"
            )
    return shares


def _described(sources: Sequence[Source], counts: Sequence[int]) -> list[dict]:
    described = []
    for source, count in zip(sources, counts, strict=True):
        entry: dict[str, Any] = {
            "file": str(source.file),
            "sha256": source.sha256,
            "kind": source.kind,
            "documents": len(source.documents),
            "tokens": count,
        }
        if source.weight is not None:
            entry["weight"] = source.weight
        described.append(entry)
    return described


def _check_vocabulary(windows: Tensor, vocab_size: int) -> None:
    largest = int(windows.max())
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer gives token {largest}, but the model has only"
            f" {vocab_size}; the tokenizer files belong to another model"
        )
