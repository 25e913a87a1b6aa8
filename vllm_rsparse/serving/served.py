# SPDX-License-Identifier: Apache-2.0
"""``ServedModel``: one process's view of the prepared model that it serves."""

import logging
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_pp_group, parallel_state

from vllm_rsparse.artifact.schema import LinearEntry
from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.formats.load_time import LoadTimeFormat
from vllm_rsparse.formats.names import AS_STORED
from vllm_rsparse.formats.registry import load_time_format
from vllm_rsparse.metrics.counters import Counters, open_counters
from vllm_rsparse.model.families import family_of
from vllm_rsparse.model.names import LinearName
from vllm_rsparse.op.observers import add_observer, remove_observer
from vllm_rsparse.serving.agreement import (
    gather_reports,
    local_report,
    require_agreement,
)
from vllm_rsparse.serving.coverage import BuiltModel, Coverage
from vllm_rsparse.serving.decision import Decision
from vllm_rsparse.serving.route import Route
from vllm_rsparse.serving.speculation import is_mtp_drafter, log_verification

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadPlan:
    """How an output layer is served that is not the base model's.

    Attributes:
        load_time: format that it is quantized to while it loads; None: as stored.
        entry: of the artifact, where it is sparse; None: every step is dense.
    """

    load_time: LoadTimeFormat | None
    entry: LinearEntry | None

    def __str__(self) -> str:
        words = [AS_STORED if self.load_time is None else self.load_time.name]
        if self.entry is not None:
            words.append(f"sparsity {self.entry.sparsity:g}")
        return ", ".join(words)

    @property
    def remedy(self) -> str:
        """What to do where the model cannot be served so."""
        return f"use head: {AS_STORED} and head_sparsity: 0"


class ServedModel:
    """The opened artifact, and what this process has built of the model.

    The linear methods of all layers share it. It is never sent to another process: only
    its decision is, and every process opens and verifies its own copy of the artifact.

    Args:
        decision: made in the API server.
        artifact: already opened here, or None to open it when it is needed.

    Attributes:
        coverage: which of the artifact's linears the layers claimed.
        heads: output layers with a weight of their own that are not the base's.
        embeddings: embeddings that can be such output layers.
    """

    def __init__(self, decision: Decision, artifact: Artifact | None = None) -> None:
        self.decision = decision
        self._artifact = artifact
        self._ranks_agree = False
        self.coverage = Coverage()
        self.heads = 0
        self.embeddings = 0
        self._engine: VllmConfig | None = None
        self._dense_drafter = False
        self._coverage_checked = False
        self._loaded: set[str] = set()
        self._weight_bytes = 0
        self._dense_bytes = 0
        self._artifact_bytes = 0
        self._counters: Counters | None = None
        self._counting = False

    def __reduce__(self) -> tuple[Any, ...]:
        return ServedModel, (self.decision,)

    @property
    def route(self) -> Route:
        """Which backend, and which steps are sparse."""
        return self.decision.route

    @property
    def load_time(self) -> LoadTimeFormat | None:
        """Format that weights are quantized to while they load; None: as stored."""
        return load_time_format(self.decision.weights)

    @property
    def artifact(self) -> Artifact:
        """The artifact, located, validated and checked against its digest once.

        Raises:
            ArtifactError: it cannot be found here, or it is damaged.
        """
        if self._artifact is None:
            self._artifact = self.decision.source.open()
        return self._artifact

    @property
    def head(self) -> HeadPlan | None:
        """How the output layer is served; None: it is the base model's."""
        decision = self.decision
        if self.route.policy.always_dense:
            return None
        sparse = decision.head_sparsity > 0
        entry = self.artifact.info.sparse_head if sparse else None
        plan = HeadPlan(load_time_format(decision.head), entry)
        return None if plan == HeadPlan(None, None) else plan

    def require_same_versions(self) -> None:
        """Refuse to serve here what a node with other versions decided.

        Raises:
            NodesDisagreeError: names the nodes and the versions.
        """
        require_agreement([self.decision.resolved_on, local_report()])

    def require_agreement(self) -> None:
        """Compare this rank's artifact and route with those of all others, once.

        A rank that cannot open its artifact takes part too: raising alone, it would
        leave the others waiting.

        Raises:
            NodesDisagreeError: a rank has another artifact, route or version.
        """
        if self._ranks_agree:
            return
        try:
            digest = self.artifact.sha256
        except ArtifactError as error:
            digest = f"none ({error})"
        mine = local_report(
            artifact=digest,
            weights=self.decision.weights,
            head=self.decision.head,
            head_sparsity=str(self.decision.head_sparsity),
            **self.route.facts(),
        )
        require_agreement(gather_reports(mine, _world_group()))
        self._ranks_agree = True

    def claim(self, prefix: str) -> list[str] | None:
        """Checkpoint names of a layer's shards, or None if the artifact lists none.

        None for every layer of an MTP drafter, too.

        Args:
            prefix: what the engine calls the layer that it builds now.

        Raises:
            ArtifactError: the artifact lists some shards and not others, or lists the
                same linears in other decoder layers but not here.
        """
        if self._engine is None:
            # Noted now: a draft model has a config of its own while it is built, and
            # the served model's again when its weights are processed.
            self._engine = get_current_vllm_config()
            self._dense_drafter = is_mtp_drafter(self._engine)
            log_verification(self.route, self._engine)
        if self._dense_drafter:
            return None
        return self.coverage.claim(self.artifact, prefix, self._checkpoint_has)

    def _checkpoint_has(self, name: LinearName) -> bool:
        """Whether config.json gives a linear to its decoder layer."""
        if self._engine is None or name.layer is None:
            return True
        model = self._engine.model_config
        family = family_of({"architectures": model.hf_config.architectures})
        layer = family.layer(vars(model.hf_text_config), name.layer)
        return any(kind.name == name.kind for kind in layer)

    def check_coverage(self) -> None:
        """Refuse an artifact that lists a linear which this model does not have, once.

        Called once every layer exists.

        Raises:
            ArtifactError: names the linear.
        """
        if self._coverage_checked or self._engine is None or self._dense_drafter:
            return
        self._coverage_checked = True
        built = _built_model(self.decision.source.model, self._engine)
        self.coverage.check(self.artifact, built)
        missing = not self.heads and not self.embeddings
        if self.head is not None and missing and get_pp_group().is_last_rank:
            raise ArtifactError(
                f"head is {self.head}, but {built.architecture} builds its output layer"
                f" without a quantization config; {self.head.remedy}"
            )

    def note_loaded(
        self,
        names: Collection[str],
        weight_bytes: int,
        dense_bytes: int,
        artifact_bytes: int,
    ) -> None:
        """Log the size of this process's layers when the last of them is loaded.

        Args:
            names: checkpoint names of the layer's shards.
            weight_bytes: of the layer's weight on this rank.
            dense_bytes: of the base model's own copy of it, 0 without one.
            artifact_bytes: of its thresholds, factors and correction.
        """
        self._loaded.update(names)
        self._weight_bytes += weight_bytes
        self._dense_bytes += dense_bytes
        self._artifact_bytes += artifact_bytes
        if self._loaded == self.coverage.claimed:
            separate = ""
            if self._dense_bytes:
                separate = (
                    f" {self._dense_bytes / (1 << 20):.1f} MiB of the base model's own"
                    " layers (dense_weights: separate),"
                )
            logger.info(
                "rsparse: %d linears loaded: %.1f MiB of weights,%s and %.1f MiB of"
                " thresholds and factors",
                len(self._loaded),
                self._weight_bytes / (1 << 20),
                separate,
                self._artifact_bytes / (1 << 20),
            )

    def open_counters(self) -> Counters | None:
        """This rank's counters, once they see the op's calls; None: metrics are off.

        Called when every layer exists, at the first one that is loaded.
        """
        if not self._counting:
            self._counting = True
            distributed = torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if distributed else 0
            self._counters = open_counters(self.decision.metrics, rank)
            if self._counters is not None:
                observer = self._counters.observe
                add_observer(observer)
                # An engine that is gone must not keep its counters alive.
                weakref.finalize(self, remove_observer, observer)
        return self._counters


def _built_model(name: str, config: VllmConfig) -> BuiltModel:
    model = config.model_config
    architectures = getattr(model.hf_config, "architectures", None) or ["the engine"]
    return BuiltModel(
        name,
        str(architectures[0]),
        model.hf_text_config.num_hidden_layers,
        config.parallel_config.pipeline_parallel_size > 1,
    )


def _world_group() -> torch.distributed.ProcessGroup | None:
    """The CPU group of all ranks that load the served model now; None if alone.

    None for a draft model too: only the last pipeline stage loads it, and the served
    model checks what it proposes.
    """
    if not parallel_state.model_parallel_is_initialized():
        return None
    config = get_current_vllm_config()
    draft = getattr(config.speculative_config, "draft_model_config", None)
    if draft is not None and draft is config.model_config:
        return None
    group = parallel_state.get_world_group()
    return group.cpu_group if group.world_size > 1 else None
