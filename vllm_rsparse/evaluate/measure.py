# SPDX-License-Identifier: Apache-2.0
"""Dense against sparse on the same held-out tokens, in one pass.

The first part of each passage is the prompt, or stands for it; the engine runs it
dense. The rest are decoded tokens. Only predictions made at sparse positions are
counted, for the dense figures too.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.artifact.schema import LinearEntry, model_sparsity
from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.errors import SettingError
from vllm_rsparse.evaluate.loading import SwitchableModel
from vllm_rsparse.model.names import HEAD, LinearName

# Logits in flight, dense and sparse, in the compute dtype; on CUDA a sixteenth of its
# memory. Bounds the batch of passages.
_BATCH_BYTES = 256 << 20


@dataclass(frozen=True)
class Loss:
    """What one artifact loses; all figures are over the same ``tokens`` predictions.

    Attributes:
        directory: the prepared directory.
        target_sparsity: the sparsity that it was prepared for.
        achieved_sparsity: kept columns and factors over dense elements, counted here,
            of the linears in the layers.
        by_kind: the same by label of a kind of linear ("q_proj", ...), and of
            "lm_head" where it is sparse.
        perplexity_dense: exp of the mean negative log likelihood, dense.
        perplexity_sparse: the same, sparse.
        kl_divergence: mean KL(dense || sparse) of the next token's distribution, nats;
            None where the engine does not give whole distributions.
        kl_standard_error: of that mean, with windows or chats drawn at random; None
            for one of them.
        top1_agreement: fraction of positions with the same most likely token.
        tokens: predictions counted.
        artifact_sha256: digest of the artifact's tensors; None: the dense base model.
    """

    directory: str
    target_sparsity: float
    achieved_sparsity: float
    by_kind: dict[str, float]
    perplexity_dense: float
    perplexity_sparse: float
    kl_divergence: float | None
    kl_standard_error: float | None
    top1_agreement: float
    tokens: int
    artifact_sha256: str | None
    ratio: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "ratio", self.perplexity_sparse / self.perplexity_dense
        )


@dataclass(frozen=True)
class Passage:
    """A text or a chat: tokens of which the leading ones are dense.

    Attributes:
        ids: int64 [positions].
        first: positions before it are dense and not counted. The prediction made at
            the last position is not counted either, for it has no label.
    """

    ids: Tensor
    first: int

    @property
    def counted(self) -> int:
        """Predictions that count."""
        return len(self.ids) - self.first - 1


@dataclass
class _Sums:
    """Of one candidate; ``kl`` has an entry for each passage.

    ``kept`` counts channels by linear, and by plane of its weight.
    """

    nll: float = 0.0
    kl: list[float] = field(default_factory=list)
    agree: int = 0
    kept: dict[str, Counter[int]] = field(default_factory=dict)

    def entries(self, artifact: Artifact, sparse_tokens: int) -> dict[str, LinearEntry]:
        """The artifact's entries with the kept fraction as counted here."""
        return {
            name: entry.counted(
                [
                    self.kept[name][plane] / (sparse_tokens * entry.shape[1])
                    for plane in range(1 if entry.full_fraction is None else 2)
                ]
            )
            for name, entry in artifact.info.entries.items()
        }


def dense_positions(window: int, dense_fraction: float) -> int:
    """Number of leading positions of a window that run dense.

    Raises:
        SettingError: no sparse position would be left to predict from.
    """
    if not 0.0 <= dense_fraction < 1.0:
        raise SettingError(f"--dense-fraction must lie in [0, 1), got {dense_fraction}")
    first = int(dense_fraction * window)
    if window - first < 2:
        raise SettingError(
            f"--window {window} with --dense-fraction {dense_fraction} leaves no"
            " sparse position that predicts a token; use longer windows"
        )
    return first


def measure(
    model: SwitchableModel,
    prepared: Sequence[PreparedDirectory],
    windows: Tensor,
    first: int,
) -> list[Loss]:
    """Evaluate artifacts of one base model side by side on windows of text.

    Args:
        model: the base model.
        prepared: one or more artifacts for it.
        windows: int64 [windows, positions].
        first: leading positions that stay dense.
    """
    return measure_passages(model, prepared, [Passage(ids, first) for ids in windows])


def measure_passages(
    model: SwitchableModel,
    candidates: Sequence[PreparedDirectory | None],
    passages: Sequence[Passage],
    reference: SwitchableModel | None = None,
) -> list[Loss]:
    """Evaluate artifacts of one base model side by side.

    Args:
        model: the base model.
        candidates: artifacts for it; None is the base model itself, dense.
        passages: what to predict; each has at least one prediction that counts.
        reference: the model to compare with; None: ``model`` itself, dense. Another one
            has the same vocabulary, for example the model that ``model`` was quantized
            from.

    Returns:
        The loss of each candidate.
    """
    reference = model if reference is None else reference
    dense_nll = 0.0
    sums = [_Sums() for _ in candidates]
    with tqdm(total=len(passages), desc="evaluate", unit="passage") as progress:
        for batch in _batches(passages, reference):
            dense = batch.logits(reference, sparse=False)
            for rows, labels in batch.chunks(dense):
                dense_nll += _nll(rows.float().log_softmax(-1), labels)
            for total, one in zip(sums, candidates, strict=True):
                # Read again for each batch: every artifact in memory at once would
                # cost more than the model.
                if one is not None:
                    model.use(one.artifact)
                sparse = batch.logits(model, sparse=one is not None)
                batch.compare(dense, sparse, total)
                for name in () if one is None else one.artifact.info.entries:
                    counts = total.kept.setdefault(name, Counter())
                    counts.update(dict(enumerate(model.kept(name))))
            progress.update(len(batch.passages))
    tokens = sum(passage.counted for passage in passages)
    perplexity = math.exp(dense_nll / tokens)
    losses = []
    for one, total in zip(candidates, sums, strict=True):
        entries: dict[str, LinearEntry] = {}
        if one is not None:
            entries = total.entries(one.artifact, tokens + len(passages))
        losses.append(
            Loss(
                directory=str(model.directory if one is None else one.path),
                target_sparsity=0.0 if one is None else one.artifact.info.sparsity,
                achieved_sparsity=layers_sparsity(entries) if entries else 0.0,
                by_kind=sparsity_by_kind(entries),
                perplexity_dense=perplexity,
                perplexity_sparse=math.exp(total.nll / tokens),
                kl_divergence=math.fsum(total.kl) / tokens,
                kl_standard_error=_standard_error(total.kl, passages),
                top1_agreement=total.agree / tokens,
                tokens=tokens,
                artifact_sha256=None if one is None else one.artifact.sha256,
            )
        )
    return losses


@dataclass(frozen=True)
class _Batch:
    """Passages that run together, the shorter ones padded at the end.

    What follows a passage does not change it, because attention is causal.
    """

    passages: Sequence[Passage]

    @property
    def first(self) -> int:
        return min(passage.first for passage in self.passages)

    def logits(self, model: SwitchableModel, sparse: bool) -> Tensor:
        """[counted predictions, vocabulary], passage after passage."""
        longest = max(len(passage.ids) for passage in self.passages)
        ids = torch.zeros(len(self.passages), longest, dtype=torch.int64)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, passage in enumerate(self.passages):
            ids[row, : len(passage.ids)] = passage.ids
            mask[row, passage.first : len(passage.ids)] = True
        # A prediction counts where the next position is part of the passage too.
        counted = mask[:, self.first : -1] & mask[:, self.first + 1 :]
        found = model.logits(ids, self.first, mask if sparse else False)
        return found[:, :-1][counted.to(found.device)]

    def chunks(self, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of logits with their labels, one passage at a time."""
        sizes = [passage.counted for passage in self.passages]
        for rows, passage in zip(logits.split(sizes), self.passages, strict=True):
            yield rows, passage.ids[passage.first + 1 :].to(logits.device)

    def compare(self, dense: Tensor, sparse: Tensor, total: _Sums) -> None:
        """Add what the sparse logits lose."""
        pairs = zip(self.chunks(dense), self.chunks(sparse), strict=True)
        for (dense_rows, labels), (sparse_rows, _) in pairs:
            exact = dense_rows.float().log_softmax(-1)
            logs = sparse_rows.to(exact.device).float().log_softmax(-1)
            total.nll += _nll(logs, labels)
            total.kl.append(_kl(exact, logs))
            total.agree += int((exact.argmax(-1) == logs.argmax(-1)).sum())


def _batches(passages: Sequence[Passage], model: SwitchableModel) -> Iterator[_Batch]:
    """Consecutive passages, as many as the memory for their logits allows."""
    room = _BATCH_BYTES
    if model.device.type == "cuda":
        room = max(
            room, torch.cuda.get_device_properties(model.device).total_memory // 16
        )
    room //= 2 * model.dtype.itemsize * model.vocab_size
    batch: list[Passage] = []
    for passage in passages:
        wider = [*batch, passage]
        first = min(other.first for other in wider)
        longest = max(len(other.ids) for other in wider)
        if batch and len(wider) * (longest - first) > room:
            yield _Batch(batch)
            wider = [passage]
        batch = wider
    if batch:
        yield _Batch(batch)


def _standard_error(sums: Sequence[float], passages: Sequence[Passage]) -> float | None:
    """Of the mean per prediction, with passages drawn at random (ratio estimator)."""
    if len(passages) < 2:
        return None
    counts = [passage.counted for passage in passages]
    mean = math.fsum(sums) / sum(counts)
    squares = ((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    variance = math.fsum(squares) * len(counts) / (len(counts) - 1)
    return math.sqrt(variance) / sum(counts)


def layers_sparsity(entries: dict[str, LinearEntry]) -> float:
    """Model-level sparsity of the layers, without the output layer."""
    return model_sparsity({n: entry for n, entry in entries.items() if n != HEAD})


def sparsity_by_kind(entries: dict[str, LinearEntry]) -> dict[str, float]:
    """Model-level sparsity by label of a kind ("q_proj", ...), factors counted."""
    labels: dict[str, dict[str, LinearEntry]] = {}
    for name, entry in entries.items():
        labels.setdefault(LinearName.parse(name).label, {})[name] = entry
    return {label: model_sparsity(members) for label, members in labels.items()}


def _nll(log_probabilities: Tensor, labels: Tensor) -> float:
    picked = log_probabilities.gather(-1, labels.unsqueeze(-1))
    return -picked.sum(dtype=torch.float64).item()


def _kl(dense: Tensor, sparse: Tensor) -> float:
    return (dense.exp() * (dense - sparse)).sum(dtype=torch.float64).item()
