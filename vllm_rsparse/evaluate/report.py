# SPDX-License-Identifier: Apache-2.0
"""Tables of losses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_rsparse.text_table import align

if TYPE_CHECKING:
    from vllm_rsparse.evaluate.measure import Loss


def table(losses: Sequence["Loss"]) -> str:
    """One column per artifact, one row per figure."""
    head = losses[0]
    rows: list[list[str]] = [
        ["", *(Path(loss.directory).name for loss in losses)],
        ["perplexity, dense", *(f"{x.perplexity_dense:.3f}" for x in losses)],
        ["perplexity, sparse", *(f"{x.perplexity_sparse:.3f}" for x in losses)],
        ["ratio", *(f"{x.ratio:.3f}" for x in losses)],
        ["KL(dense || sparse), nats", *(_optional(x.kl_divergence, 4) for x in losses)],
        ["  its standard error", *(_optional(x.kl_standard_error, 4) for x in losses)],
        ["top-1 agreement", *(f"{x.top1_agreement:.3f}" for x in losses)],
        ["target sparsity", *(f"{x.target_sparsity:.3f}" for x in losses)],
        ["achieved sparsity", *(f"{x.achieved_sparsity:.3f}" for x in losses)],
    ]
    for kind in head.by_kind:
        shown = (x.by_kind.get(kind) for x in losses)
        rows.append([f"  {kind}", *(_optional(s, 3) for s in shown)])
    rows.append(["tokens counted", *(str(x.tokens) for x in losses)])
    return align(rows)


def _optional(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def chat_table(domains: Mapping[str, Sequence["Loss"]]) -> str:
    """One column per candidate, one row per figure and domain.

    Args:
        domains: losses of the same candidates in each domain; at least one.
    """
    columns = [*zip(*domains.values(), strict=True)]
    rows = [["", *(_name(losses[0]) for losses in columns)]]
    for name, losses in domains.items():
        shown = (f"{x.kl_divergence:.4f} ± {_error(x)}" for x in losses)
        rows.append([f"KL(dense || sparse), {name}", *shown])
    kl = [[x.kl_divergence or 0.0 for x in losses] for losses in columns]
    rows.append(["  mean of the domains", *(f"{sum(x) / len(x):.4f}" for x in kl)])
    rows.append(["  worst domain", *(f"{max(x):.4f}" for x in kl)])
    for name, losses in domains.items():
        shown = (f"{x.top1_agreement:.3f}" for x in losses)
        rows.append([f"top-1 agreement, {name}", *shown])
    targets = (f"{losses[0].target_sparsity:.3f}" for losses in columns)
    rows.append(["target sparsity", *targets])
    achieved = (
        sum(x.achieved_sparsity * x.tokens for x in losses)
        / sum(x.tokens for x in losses)
        for losses in columns
    )
    rows.append(["achieved sparsity", *(f"{x:.3f}" for x in achieved)])
    counted = (str(sum(x.tokens for x in losses)) for losses in columns)
    rows.append(["tokens counted", *counted])
    return align(rows)


def _name(loss: "Loss") -> str:
    """The directory's name; that of the base, which has the same, is marked."""
    dense = " (dense)" if loss.artifact_sha256 is None else ""
    return Path(loss.directory).name + dense


def _error(loss: "Loss") -> str:
    return _optional(loss.kl_standard_error, 4)
