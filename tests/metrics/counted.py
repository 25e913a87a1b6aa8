# SPDX-License-Identifier: Apache-2.0
"""A model whose counts are worked out apart from it, and what the exporter shows."""

from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_rsparse.metrics.counters import Counters, Settings
from vllm_rsparse.metrics.exporter import Exporter
from vllm_rsparse.op import layers, observers, ops
from vllm_rsparse.op.backends import Backend
from vllm_rsparse.testing.cases import make_case

K = 24
# name of a fused layer's shards -> (N of each shard, rank of each).
LAYERS = {
    ("layers.0.attn.q_proj", "layers.0.attn.k_proj"): ([32, 8], [4, 0]),
    ("layers.0.mlp.up_proj",): ([16], [2]),
    ("layers.1.attn.q_proj", "layers.1.attn.k_proj"): ([32, 8], [0, 0]),
}


class Model:
    """Layers that the op is called with, and the counts worked out apart from it."""

    def __init__(self, device: str = "cpu") -> None:
        self.layers = []
        for seed, (names, (sizes, ranks)) in enumerate(LAYERS.items()):
            case = make_case(1, K, sizes, ranks, seed=seed, device=device)
            number = layers.next_layer()
            layers.set_layer(case.operands.thresholds, number)
            self.layers.append((number, names, case.operands))

    def register(self, counters: Counters, reverse: bool = False) -> None:
        for number, names, operands in self.layers[:: -1 if reverse else 1]:
            counters.register(number, names, operands)

    def step(self, x: torch.Tensor, limit: int = 2) -> torch.Tensor:
        return torch.cat(
            [
                ops.linear(x, *operands.schema_args(), limit, int(Backend.REFERENCE))
                for _, _, operands in self.layers
            ],
            dim=1,
        )

    def expected(self, x: torch.Tensor) -> dict[str, list[int]]:
        """Kind -> channels seen, kept, and bytes read, of one sampled step."""
        totals: dict[str, list[int]] = {}
        for _, names, operands in self.layers:
            sizes, ranks = operands.shard_sizes, operands.ranks
            shards = zip(names, operands.thresholds.cpu(), sizes, ranks, strict=True)
            for name, thresholds, n, rank in shards:
                kept = [
                    {j for j in range(K) if abs(float(row[j])) > float(thresholds[j])}
                    for row in x.cpu()
                ]
                rows = len(set().union(*kept))
                # Rows of V: those of dropped channels; of several tokens, all.
                rows_of_v = K - rows if len(kept) == 1 else K
                read = 4 * (rows * n + rank * (n + rows_of_v))
                read += 4 * K + 4 * K * len(kept) // len(names)  # thresholds, x
                mine = [K * len(kept), sum(map(len, kept)), read]
                before = totals.get(name.split(".")[-1], [0, 0, 0])
                totals[name.split(".")[-1]] = [
                    a + b for a, b in zip(before, mine, strict=True)
                ]
        return totals


def scrape(collector: Exporter) -> dict[tuple[str, ...], float]:
    """(sample, label values...) -> value, through the text format."""
    registry = CollectorRegistry()
    registry.register(collector)
    text = generate_latest(registry).decode()
    return {
        (sample.name.removeprefix("vllm_rsparse_"), *sample.labels.values()): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def count(
    directory: Path,
    model: Model,
    interval: int = 1,
    rank: int = 0,
    reverse: bool = False,
) -> None:
    counters = Counters(Settings(directory, interval), rank)
    model.register(counters, reverse)
    observers._observers.clear()
    observers.add_observer(counters.observe)
