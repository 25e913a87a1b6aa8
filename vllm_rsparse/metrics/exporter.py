# SPDX-License-Identifier: Apache-2.0
"""The API server's side: reads the ranks' counts when /metrics is scraped."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from vllm_rsparse import __version__
from vllm_rsparse.artifact.schema import ArtifactInfo
from vllm_rsparse.metrics import layout
from vllm_rsparse.metrics.counters import Settings
from vllm_rsparse.metrics.directory import CountsDirectory
from vllm_rsparse.model.names import LinearName

logger = logging.getLogger(__name__)

_PREFIX = "vllm_rsparse_"


@dataclass(frozen=True)
class Facts:
    """Facts known before a step runs: labels of the info metric, calibration."""

    info: dict[str, str]
    calibrated: dict[str, float]


def facts(info: ArtifactInfo, backend: str, max_sparse_tokens: int) -> Facts:
    """Facts of an artifact and of the decisions made about it."""
    kept: dict[str, float] = {}
    channels: dict[str, int] = {}
    for name, entry in info.entries.items():
        label = LinearName.parse(name).label
        # As it is counted: planes of a weight are seen and kept one by one.
        fraction = entry.kept_fraction
        if entry.full_fraction is not None:
            fraction = (fraction + entry.full_fraction) / 2
        kept[label] = kept.get(label, 0) + fraction * entry.shape[1]
        channels[label] = channels.get(label, 0) + entry.shape[1]
    return Facts(
        {
            "version": __version__,
            "backend": backend,
            "max_sparse_tokens": str(max_sparse_tokens),
            "sparsity": f"{info.achieved_sparsity:.3f}",
            "artifact_sha256": info.tensors_sha256,
        },
        {label: kept[label] / channels[label] for label in kept},
    )


class Exporter(Collector):
    """Metrics of this process's engine.

    Args:
        directory: where its ranks count.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.facts: Facts | None = None

    def collect(self) -> Iterator[Metric]:
        """All families; those of the ranks appear with the first step."""
        if self.facts is not None:
            yield from self._static(self.facts)
        ranks = layout.read_ranks(self.directory)
        if not ranks:
            return
        yield GaugeMetricFamily(
            f"{_PREFIX}ranks", "Ranks on this machine that count.", len(ranks)
        )
        # All ranks take part in every step and take the same route: the first one's.
        slots = ranks[0][1]
        yield self._steps(slots)
        yield CounterMetricFamily(
            f"{_PREFIX}sampled_tokens",
            "Tokens of the sparse steps whose masks were counted.",
            int(slots[layout.SAMPLED_TOKENS]),
        )
        yield from self._kinds(ranks)

    @staticmethod
    def _static(known: Facts) -> Iterator[Metric]:
        info = GaugeMetricFamily(
            f"{_PREFIX}info", "What is served, and how.", labels=list(known.info)
        )
        info.add_metric(list(known.info.values()), 1)
        yield info
        calibrated = GaugeMetricFamily(
            f"{_PREFIX}calibrated_kept_fraction",
            "Fraction of the channels kept on the calibration text.",
            labels=["kind"],
        )
        for kind, fraction in known.calibrated.items():
            calibrated.add_metric([kind], fraction)
        yield calibrated

    @staticmethod
    def _steps(slots: Any) -> Metric:
        family = HistogramMetricFamily(
            f"{_PREFIX}step_tokens",
            "Tokens of the steps that took the sparse and the dense route.",
            labels=["route"],
        )
        bounds = [*map(str, map(float, layout.BUCKETS)), "+Inf"]
        for route, name in enumerate(layout.ROUTES):
            start = layout.step_slot(route, 0)
            counts = slots[start : layout.token_slot(route)].cumsum()
            family.add_metric(
                [name],
                [(b, int(c)) for b, c in zip(bounds, counts, strict=True)],
                int(slots[layout.token_slot(route)]),
            )
        return family

    @staticmethod
    def _kinds(ranks: list[tuple[layout.Header, Any]]) -> Iterator[Metric]:
        """Sums over the ranks, which together hold each layer once."""
        dense: dict[str, int] = {}
        sums: dict[str, Any] = {}
        for header, slots in ranks:
            rows = slots[layout.FIRST_KIND :].reshape(-1, layout.KIND_SLOTS)
            for (kind, size), row in zip(header.kinds.items(), rows, strict=True):
                dense[kind] = dense.get(kind, 0) + size
                sums[kind] = sums.get(kind, 0) + row
        weights = GaugeMetricFamily(
            f"{_PREFIX}dense_bytes",
            "Bytes of the linears' weights: what a dense step reads.",
            labels=["kind"],
        )
        for kind, size in dense.items():
            weights.add_metric([kind], size)
        yield weights
        for column, (name, text) in enumerate(
            (
                ("channels", "Input channels seen in sampled sparse steps."),
                ("channels_kept", "Input channels kept in sampled sparse steps."),
                ("read_bytes", "Bytes of weights read by sampled sparse steps."),
            )
        ):
            family = CounterMetricFamily(
                f"{_PREFIX}sampled_{name}", text, labels=["kind"]
            )
            for kind, row in sums.items():
                family.add_metric([kind], int(row[column]))
            yield family


_directory: CountsDirectory | None = None
_exporter: Exporter | None = None


def start(interval: int, known: Facts) -> Settings | None:
    """Export this process's engine on vLLM's /metrics; returns its workers' settings.

    Args:
        interval: one sparse step out of ``interval`` is sampled; 0 exports nothing.
        known: facts of the model.
    """
    global _directory, _exporter
    if interval == 0:
        return None
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        logger.warning(
            "rsparse: metrics are not exported: with several API servers, or with"
            " PROMETHEUS_MULTIPROC_DIR set, /metrics shows only what vLLM collects;"
            " VLLM_RSPARSE_METRICS_INTERVAL=0 stops this warning"
        )
        return None
    if _exporter is None:
        try:
            _directory = CountsDirectory()
        except OSError as error:
            logger.warning(
                "rsparse: metrics are not exported: no temporary directory (%s);"
                " set TMPDIR to a writable one",
                error,
            )
            return None
        _exporter = Exporter(_directory.path)
        REGISTRY.register(_exporter)
    _exporter.facts = known
    return Settings(_exporter.directory, interval)
