# SPDX-License-Identifier: Apache-2.0
"""``RSparseConfig``: what vLLM knows of a prepared model; which layers it covers."""

import logging
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import (
    LinearBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.platforms import current_platform

from vllm_rsparse import envs
from vllm_rsparse.artifact.locate import locate_artifact
from vllm_rsparse.artifact.schema import FORMAT_VERSION
from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.metrics import exporter
from vllm_rsparse.metrics.counters import Settings
from vllm_rsparse.op.ops import Backend, resolve_backend
from vllm_rsparse.serving.agreement import (
    Report,
    gather_reports,
    local_report,
    require_agreement,
)
from vllm_rsparse.serving.config_keys import HOW_TO, check_keys
from vllm_rsparse.serving.coverage import refuse_gap, refuse_unclaimed
from vllm_rsparse.serving.route import default_max_sparse_tokens
from vllm_rsparse.serving.worker_state import WorkerState

logger = logging.getLogger(__name__)


class RSparseConfig(QuantizationConfig):
    """Quantization config of the method ``rsparse``.

    It is built in the API server, resolved against the model directory there
    (``maybe_update_config``), and pickled to every worker, so that all ranks see one
    routing decision. The opened artifact does not travel: each process opens and
    verifies its own copy. A node whose versions or files differ is found before weights
    are loaded (``agreement``).

    Args:
        artifact: where the artifact is: a path inside the model directory, an absolute
            path, or a Hub repository. None (``--quantization rsparse`` on a plain
            checkpoint) is refused with directions as soon as the model is known.
        artifact_sha256: digest the tensor file must have, or None.
        max_sparse_tokens: switch point of the routing; None takes the environment's
            value, then the device's measured default. 0 serves dense.
        backend: ``auto`` or a backend by name; None takes the environment's.
    """

    def __init__(
        self,
        artifact: str | None = None,
        artifact_sha256: str | None = None,
        max_sparse_tokens: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.artifact_source = artifact
        self.artifact_sha256 = artifact_sha256
        self.requested_max_sparse_tokens = max_sparse_tokens
        self.requested_backend = backend
        self.model_name: str | None = None
        self.revision: str | None = None
        self.backend: Backend | None = None
        self.max_sparse_tokens = 0
        self.metrics: Settings | None = None
        self._resolved_on: Report | None = None
        self.worker = WorkerState()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "worker": WorkerState()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in another process, perhaps on a node with other versions.

        Raises:
            NodesDisagreeError: names the node and the versions. Here and not later, as
                what else arrives would already be read by the wrong release.
        """
        self.__dict__.update(state)
        if self._resolved_on is not None:
            require_agreement([self._resolved_on, local_report()])

    @classmethod
    def get_name(cls) -> str:
        return "rsparse"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        # bf16 tensors and the kernels' instructions need Ampere.
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RSparseConfig":
        """Build from ``quantization_config`` of config.json or ``--hf-overrides``.

        Raises:
            ValueError: unknown key, wrong type or value, unsupported format version.
        """
        check_keys(config)
        return cls(
            artifact=config.get("artifact"),
            artifact_sha256=config.get("artifact_sha256"),
            max_sparse_tokens=config.get("max_sparse_tokens"),
            backend=config.get("backend"),
        )

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: Any = None,
        revision: str | None = None,
    ) -> None:
        """Resolve backend, route and artifact, and write them into ``hf_config``.

        vLLM's compile cache keys on the Hugging Face config and not on this object or
        on files; with the digest and the switch point in there, a changed artifact
        cannot be served by a stale graph.
        """
        self.model_name, self.revision = model_name, revision
        self._resolved_on = local_report()
        name = envs.backend()
        if name == "auto" and self.requested_backend is not None:
            name = self.requested_backend
        self.backend = resolve_backend(name, current_platform.device_type)
        artifact = self.open_artifact()
        limit = envs.max_sparse_tokens()
        if limit is None:
            limit = self.requested_max_sparse_tokens
        if limit is None:
            read = 1 - artifact.info.achieved_sparsity
            limit = default_max_sparse_tokens(self.backend, read)
        self.max_sparse_tokens = limit
        if self.artifact_sha256 is None:
            self.artifact_sha256 = artifact.sha256
        if hf_config is not None:
            hf_config.quantization_config = {
                "quant_method": "rsparse",
                "format_version": FORMAT_VERSION,
                "artifact": self.artifact_source,
                "artifact_sha256": self.artifact_sha256,
                "sparsity": artifact.info.sparsity,
                "max_sparse_tokens": self.max_sparse_tokens,
                "backend": self.backend.label,
            }
        backend = self.backend.label
        self.metrics = exporter.start(
            envs.metrics_interval(), exporter.facts(artifact.info, backend, limit)
        )
        logger.info(
            "rsparse: backend %s, sparse up to %d tokens a step, dense above;"
            " target sparsity %.3f, %.3f on the calibration text; artifact %s",
            backend,
            self.max_sparse_tokens,
            artifact.info.sparsity,
            artifact.info.achieved_sparsity,
            artifact.directory,
        )

    def open_artifact(self) -> Artifact:
        """The artifact, located, validated and checked against its digest once.

        Raises:
            ArtifactError: none was named, it cannot be found, or it is damaged.
        """
        if self.worker.artifact is None:
            if self.artifact_source is None or self.model_name is None:
                raise ArtifactError(
                    f"--quantization rsparse: {self.model_name or 'the model'} names no"
                    f" artifact in its config. {HOW_TO}"
                )
            directory = locate_artifact(
                self.artifact_source, self.model_name, self.revision
            )
            artifact = Artifact(directory)
            artifact.verify_digest(self.artifact_sha256)
            self.worker.artifact = artifact
        return self.worker.artifact

    def _require_agreement(self) -> None:
        """Compare this rank's artifact and routing with those of all others, once.

        A rank that cannot open its artifact takes part too: raising alone, it would
        leave the others waiting.
        """
        if self.worker.ranks_agree:
            return
        try:
            artifact = self.open_artifact().sha256
        except ArtifactError as error:
            artifact = f"none ({error})"
        mine = local_report(
            artifact=artifact,
            backend=str(self.backend and self.backend.name.lower()),
            max_sparse_tokens=str(self.max_sparse_tokens),
        )
        require_agreement(gather_reports(mine, _world_group()))
        self.worker.ranks_agree = True

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        """The sparse method for a linear that the artifact lists, else the plain one.

        Raises:
            ArtifactError: the artifact lists some shards of a fused layer and not
                others, or lists such a linear in other decoder layers but not here.
            NodesDisagreeError: a rank has another artifact, route or version.
        """
        if not isinstance(layer, LinearBase):
            return None
        self._require_agreement()
        artifact = self.open_artifact()
        names = self._checkpoint_names(prefix)
        listed = [name for name in names if name in artifact.info.linears]
        if len(listed) < len(names):
            refuse_gap(artifact, names, listed)
            return UnquantizedLinearMethod()
        self.worker.claimed.update(names)
        if self.max_sparse_tokens == 0:
            return UnquantizedLinearMethod()
        from vllm_rsparse.serving.linear import RSparseLinearMethod

        return RSparseLinearMethod(self, names)

    def check_all_claimed(self) -> None:
        """Refuse an artifact that names a linear this model does not have.

        Called once every layer exists. Under pipeline parallelism a worker builds only
        its own decoder layers; a name is then judged by the layers around it.

        Raises:
            ArtifactError: names the linear.
        """
        if self.worker.checked:
            return
        self.worker.checked = True
        config = get_current_vllm_config()
        refuse_unclaimed(
            self.open_artifact(),
            self.worker.claimed,
            model=str(self.model_name),
            layers=config.model_config.hf_text_config.num_hidden_layers,
            staged=config.parallel_config.pipeline_parallel_size > 1,
        )

    def _checkpoint_names(self, prefix: str) -> list[str]:
        """Names in the checkpoint behind a vLLM layer: q, k, v for ``...qkv_proj``."""
        parent, _, kind = prefix.rpartition(".")
        kinds = self.packed_modules_mapping.get(kind, [kind])
        return [f"{parent}.{k}" if parent else k for k in kinds]


def _world_group() -> torch.distributed.ProcessGroup | None:
    """The CPU group of all ranks that load the served model now; None where alone.

    A draft model is left out: only the last pipeline stage loads it, and what it
    proposes is checked by the served model.
    """
    if not parallel_state.model_parallel_is_initialized():
        return None
    config = get_current_vllm_config()
    draft = getattr(config.speculative_config, "draft_model_config", None)
    if draft is not None and draft is config.model_config:
        return None
    group = parallel_state.get_world_group()
    return group.cpu_group if group.world_size > 1 else None
