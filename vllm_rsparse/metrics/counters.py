# SPDX-License-Identifier: Apache-2.0
"""Counting in a worker: steps by route, and, in sampled steps, what the masks keep.

The op calls :meth:`Counters.observe` where its Python body runs: at every call on a CPU
and in eager mode, but only at capture under CUDA graphs. On a GPU the device therefore
counts the steps: the addition is captured with the first linear's kernel and replayed
with it. It writes directly to the mapped file, so nothing has to copy or wait. Masks
are not counted inside a graph: a separate launch per linear would cost more than the
0.5% of a step that metrics may take.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vllm_rsparse.metrics import layout
from vllm_rsparse.metrics.mapped import on_device
from vllm_rsparse.model.names import LinearName
from vllm_rsparse.op.operands import SparseOperands
from vllm_rsparse.op.reference import kept_mask

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Decided in the API server, pickled to every worker inside the model's config.

    Attributes:
        directory: where the ranks of this engine count.
        interval: the masks of one sparse step out of ``interval`` are counted.
    """

    directory: Path
    interval: int


class Counters:
    """The counters of one rank.

    Args:
        settings: where to count, how often to sample.
        rank: of this process among the engine's workers.
    """

    def __init__(self, settings: Settings, rank: int) -> None:
        self._directory = settings.directory
        self._interval = settings.interval
        self._rank = rank
        self._kinds: dict[str, int] = {}
        # By number of the layer: the row in the table of each row of thresholds.
        self._rows: dict[int, Tensor] = {}
        # By number and tokens: bytes per channel and other bytes, each like the rows.
        self._costs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._first: int | None = None
        self._last: int | None = None
        self._sparse_steps = 0
        self._sampling = False
        self._slots: Tensor | None = None
        self._add: Callable[[dict[int, int]], None]

    def register(
        self,
        layer: int,
        names: Sequence[str],
        operands: SparseOperands,
        last: bool = False,
    ) -> None:
        """Register a loaded layer.

        Args:
            layer: its number (``op.layers``). A layer that is reloaded keeps its place.
            names: checkpoint names of its S shards.
            operands: the op's operands on this rank.
            last: it is the output layer, which runs after all others and sees only
                the positions that are sampled from.
        """
        if layer in self._rows:
            return
        rows, weight = [], operands.weight
        for name, n in zip(names, operands.shard_sizes, strict=True):
            label = LinearName.parse(name).label
            dense = weight.format.bytes_of(weight, n).whole(weight.k)
            self._kinds[label] = self._kinds.get(label, 0) + int(dense)
            rows.append(list(self._kinds).index(label))
        if last:
            self._last = layer
        rows *= weight.format.planes
        self._rows[layer] = torch.tensor(rows, device=weight.device)

    def observe(
        self, layer: int, x: Tensor, operands: SparseOperands, dense: bool
    ) -> None:
        """Count one call of the op; never synchronises with the device.

        A step begins with the layer that was called first of all. That need not be the
        one that was loaded first: weights that are quantized while they load arrive in
        the order of the checkpoint's files.
        """
        if layer not in self._rows or x.shape[0] == 0:
            return
        if self._first is None and layer != self._last:
            self._first = layer
        if layer == self._first:
            self._count_step(x, dense)
        if self._sampling and not dense:
            self._count_channels(layer, x, operands)
        if layer == self._last:
            # It also runs where a graph is replayed, after which none of the others
            # says that another step has begun.
            self._sampling = False

    def _count_step(self, x: Tensor, dense: bool) -> None:
        tokens = x.shape[0]
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._slots is None:
            if capturing:
                return  # mapping memory would break it; a dummy run comes before
            try:
                self._open(x.device)
            except (OSError, RuntimeError) as error:
                logger.warning("rsparse: rank %d does not count: %s", self._rank, error)
                self._rows.clear()
                return
        route = int(dense)
        counts = {layout.step_slot(route, tokens): 1, layout.token_slot(route): tokens}
        # A sampled step stays sampled until the next one begins.
        self._sampling = (
            not dense and not capturing and self._sparse_steps % self._interval == 0
        )
        self._sparse_steps += not dense
        if self._sampling:
            counts[layout.SAMPLED_TOKENS] = tokens
        self._add(counts)

    def _count_channels(self, layer: int, x: Tensor, operands: SparseOperands) -> None:
        assert self._slots is not None  # a step was counted before
        mask = kept_mask(x, operands.thresholds)
        kept = mask.sum(dim=(1, 2))
        # A channel that several tokens keep is read once.
        distinct = kept if x.shape[0] == 1 else mask.any(dim=1).sum(dim=1)
        channel_bytes, other_bytes = self._cost(layer, x, operands)
        read = (distinct * channel_bytes + other_bytes).round().long()
        seen = torch.full_like(kept, mask.shape[1] * mask.shape[2])
        table = self._slots[layout.FIRST_KIND :].view(-1, layout.KIND_SLOTS)
        table.index_add_(0, self._rows[layer], torch.stack([seen, kept, read], dim=1))

    def _cost(
        self, layer: int, x: Tensor, operands: SparseOperands
    ) -> tuple[Tensor, Tensor]:
        key = layer, x.shape[0]
        if key not in self._costs:
            costs = torch.tensor(operands.read_cost(x.shape[0]), dtype=torch.float64)
            channel_bytes, other_bytes = costs.to(x.device).unbind(1)
            self._costs[key] = channel_bytes, other_bytes
        return self._costs[key]

    def _open(self, device: torch.device) -> None:
        header = layout.Header(self._rank, self._kinds)
        path = layout.counts_path(self._directory, self._rank)
        slots = torch.from_file(
            str(path), shared=True, size=header.slots, dtype=torch.int64
        )
        self._slots = on_device(slots, device)
        if device.type == "cpu":
            # Ten times as fast as adding to an element of a tensor.
            array = slots.numpy()

            def add(counts: dict[int, int]) -> None:
                for slot, amount in counts.items():
                    array[slot] += amount

        else:
            view = self._slots

            def add(counts: dict[int, int]) -> None:
                # One launch: each would wait for its own read of the host's memory.
                # Two cost 4.1 us per step on an H200, 0.9% of a 1B model's linears.
                torch._foreach_add_([view[slot] for slot in counts], [*counts.values()])

        self._add = add
        layout.write_header(self._directory, header)


def open_counters(settings: Settings | None, rank: int) -> Counters | None:
    """The counters of this process, or None if metrics are off or unavailable."""
    if settings is None:
        return None
    if not settings.directory.is_dir():
        logger.info(
            "rsparse: rank %d runs on another machine than the API server; its counts"
            " do not appear on /metrics",
            rank,
        )
        return None
    return Counters(settings, rank)
