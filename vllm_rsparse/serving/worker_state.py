# SPDX-License-Identifier: Apache-2.0
"""``WorkerState``: what one process knows of the model whose layers it builds."""

import logging
from collections.abc import Collection

import torch

from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.metrics.counters import Counters, Settings, open_counters
from vllm_rsparse.op.ops import set_observer

logger = logging.getLogger(__name__)


class WorkerState:
    """Filled while a process builds and loads its layers; never sent to another one.

    Attributes:
        artifact: opened and verified here, once.
        ranks_agree: the ranks were compared.
        checked: the artifact's linears were compared with the model's.
        claimed: checkpoint names that this process's layers took.
    """

    def __init__(self) -> None:
        self.artifact: Artifact | None = None
        self.ranks_agree = False
        self.checked = False
        self.claimed: set[str] = set()
        self._loaded: set[str] = set()
        self._weight_bytes = 0
        self._artifact_bytes = 0
        self._counters: Counters | None = None
        self._counting = False

    def note_loaded(
        self, names: Collection[str], weight_bytes: int, artifact_bytes: int
    ) -> None:
        """Log what this process's layers hold, when the last of them is loaded.

        Args:
            names: checkpoint names of the layer's shards.
            weight_bytes: of the layer's weight on this rank.
            artifact_bytes: of its thresholds, factors and correction.
        """
        self._loaded.update(names)
        self._weight_bytes += weight_bytes
        self._artifact_bytes += artifact_bytes
        if self._loaded == self.claimed:
            logger.info(
                "rsparse: %d linears loaded: %.1f MiB of weights, %.1f MiB of"
                " thresholds and factors beside them",
                len(self._loaded),
                self._weight_bytes / (1 << 20),
                self._artifact_bytes / (1 << 20),
            )

    def open_counters(self, metrics: Settings | None) -> Counters | None:
        """This rank's counters, once they see the op's calls; None: metrics are off.

        Called when every layer exists, at the first one that is loaded.
        """
        if not self._counting:
            self._counting = True
            distributed = torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if distributed else 0
            self._counters = open_counters(metrics, rank)
            set_observer(None if self._counters is None else self._counters.observe)
        return self._counters
