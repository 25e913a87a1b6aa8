# SPDX-License-Identifier: Apache-2.0
"""Dense against sparse on the same held-out tokens, in one pass.

The first part of each window stands for the prompt, which the engine runs dense; the
rest stands for decoded tokens. Only predictions made at sparse positions are counted,
for the dense figures too.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.artifact.schema import LinearEntry, model_sparsity
from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.errors import SettingError
from vllm_rsparse.evaluate.loading import SwitchableModel
from vllm_rsparse.model.names import LinearName

# Logits in flight, dense and sparse, as float32: bounds the batch of windows.
BATCH_BYTES = 256 << 20


@dataclass(frozen=True)
class Loss:
    """What one artifact loses; all figures are over the same ``tokens`` predictions.

    Attributes:
        directory: the prepared directory.
        target_sparsity: the sparsity that it was prepared for.
        achieved_sparsity: kept columns and factors over dense elements, counted here.
        by_kind: the same by label of a kind of linear ("q_proj", ...).
        perplexity_dense: exp of the mean negative log likelihood, dense.
        perplexity_sparse: the same, sparse.
        kl_divergence: mean KL(dense || sparse) of the next token's distribution, nats;
            None where the engine does not give whole distributions.
        top1_agreement: fraction of positions with the same most likely token.
        tokens: predictions counted.
        artifact_sha256: digest of the artifact's tensors.
    """

    directory: str
    target_sparsity: float
    achieved_sparsity: float
    by_kind: dict[str, float]
    perplexity_dense: float
    perplexity_sparse: float
    kl_divergence: float | None
    top1_agreement: float
    tokens: int
    artifact_sha256: str
    ratio: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "ratio", self.perplexity_sparse / self.perplexity_dense
        )


@dataclass
class _Sums:
    nll: float = 0.0
    kl: float = 0.0
    agree: int = 0
    kept: Counter[str] = field(default_factory=Counter)

    def entries(self, artifact: Artifact, sparse_tokens: int) -> dict[str, LinearEntry]:
        """The artifact's entries with the kept fraction as counted here."""
        return {
            name: replace(
                entry, kept_fraction=self.kept[name] / (sparse_tokens * entry.shape[1])
            )
            for name, entry in artifact.info.linears.items()
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
    """Evaluate artifacts of one base model side by side.

    Args:
        model: the base model.
        prepared: one or more artifacts for it.
        windows: int64 [windows, positions].
        first: leading positions that stay dense.
    """
    length = windows.shape[1]
    vocabulary = model.model.get_output_embeddings().weight.shape[0]
    batch = max(1, BATCH_BYTES // (8 * (length - first) * vocabulary))
    dense_nll = 0.0
    sums = [_Sums() for _ in prepared]
    with tqdm(total=len(windows), desc="evaluate", unit="window") as progress:
        for part in windows.split(batch):
            labels = part[:, first + 1 :].to(model.device)
            dense = _log_probabilities(model, part, first, sparse=False)
            dense_nll += _nll(dense, labels)
            for total, one in zip(sums, prepared, strict=True):
                # Read again for each batch: every artifact in memory at once would
                # cost more than the model.
                model.use(one.artifact)
                sparse = _log_probabilities(model, part, first, sparse=True)
                total.nll += _nll(sparse, labels)
                total.kl += _kl(dense, sparse)
                total.agree += int((dense.argmax(-1) == sparse.argmax(-1)).sum())
                for name in one.artifact.info.linears:
                    total.kept[name] += model.linears[name].kept
            progress.update(len(part))
    tokens = len(windows) * (length - first - 1)
    perplexity = math.exp(dense_nll / tokens)
    losses = []
    for one, total in zip(prepared, sums, strict=True):
        entries = total.entries(one.artifact, len(windows) * (length - first))
        losses.append(
            Loss(
                directory=str(one.path),
                target_sparsity=one.artifact.info.sparsity,
                achieved_sparsity=model_sparsity(entries),
                by_kind=sparsity_by_kind(entries),
                perplexity_dense=perplexity,
                perplexity_sparse=math.exp(total.nll / tokens),
                kl_divergence=total.kl / tokens,
                top1_agreement=total.agree / tokens,
                tokens=tokens,
                artifact_sha256=one.artifact.sha256,
            )
        )
    return losses


def sparsity_by_kind(entries: dict[str, LinearEntry]) -> dict[str, float]:
    """Model-level sparsity by label of a kind ("q_proj", ...), factors counted."""
    labels: dict[str, dict[str, LinearEntry]] = {}
    for name, entry in entries.items():
        labels.setdefault(LinearName.parse(name).label, {})[name] = entry
    return {label: model_sparsity(members) for label, members in labels.items()}


def _log_probabilities(
    model: SwitchableModel, windows: Tensor, first: int, sparse: bool
) -> Tensor:
    """float32 [windows, positions - first - 1, vocabulary]: all that have a label."""
    logits = model.logits(windows, first, sparse)[:, :-1]
    return functional.log_softmax(logits.float(), dim=-1)


def _nll(log_probabilities: Tensor, labels: Tensor) -> float:
    picked = log_probabilities.gather(-1, labels.unsqueeze(-1))
    return -picked.sum(dtype=torch.float64).item()


def _kl(dense: Tensor, sparse: Tensor) -> float:
    return (dense.exp() * (dense - sparse)).sum(dtype=torch.float64).item()
