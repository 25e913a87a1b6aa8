# SPDX-License-Identifier: Apache-2.0
"""``RSparseConfig``: the quantization config that vLLM sees."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.platforms import current_platform

from vllm_rsparse import envs
from vllm_rsparse.artifact.schema import FORMAT_VERSION
from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.metrics import exporter
from vllm_rsparse.serving.agreement import local_report
from vllm_rsparse.serving.config_keys import HOW_TO, check_keys
from vllm_rsparse.serving.dense import DenseLinearMethod
from vllm_rsparse.serving.linear import RSparseLinearMethod
from vllm_rsparse.serving.route import Route, RouteRequest, choose_route
from vllm_rsparse.serving.served import ArtifactSource, Decision, ServedModel
from vllm_rsparse.serving.weights.factory import checkpoint_weights

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

logger = logging.getLogger(__name__)


class RSparseConfig(QuantizationConfig):
    """Quantization config of the method ``rsparse``: vLLM's interface and no more.

    It is built in the API server, resolved against the model directory there
    (``maybe_update_config``), and pickled to every worker, so that all ranks see one
    routing decision. The opened artifact is not sent: each process opens and verifies
    its own copy (``ServedModel``). A node whose versions or files differ is found
    before weights are loaded (``agreement``).

    Args:
        artifact: where the artifact is: a path inside the model directory, an absolute
            path, or a Hub repository. None (``--quantization rsparse`` on a plain
            checkpoint) is refused with directions as soon as the model is known.
        artifact_sha256: digest the tensor file must have, or None.
        max_sparse_tokens: switch point of the routing; 0 serves dense. The environment
            overrides it; None leaves it to the measured default of the device.
        backend: ``auto`` or a backend by name. The environment overrides it.
    """

    def __init__(
        self,
        artifact: str | None = None,
        artifact_sha256: str | None = None,
        max_sparse_tokens: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.artifact = artifact
        self.artifact_sha256 = artifact_sha256
        self.requested = RouteRequest.of_config(
            "quantization_config", backend, max_sparse_tokens
        )
        self._served: ServedModel | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in another process, perhaps on a node with other versions.

        Raises:
            NodesDisagreeError: names the node and the versions. Here and not later, as
                what else arrives would already be read by the wrong release.
        """
        self.__dict__.update(state)
        if self._served is not None:
            self._served.require_same_versions()

    @property
    def served(self) -> ServedModel:
        """The model that this config was resolved against.

        Raises:
            ValueError: it was not.
        """
        if self._served is None:
            raise ValueError(
                "RSparseConfig was not resolved: call maybe_update_config(model) first"
            )
        return self._served

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
        """Open the artifact, choose the route, and write both into ``hf_config``.

        Raises:
            ArtifactError: none was named, it cannot be found, or it is damaged.
            ValueError: a setting is not allowed, or cannot run here.
        """
        source = self._artifact_source(model_name, revision)
        artifact = source.open()
        route = choose_route(
            [self.requested],
            current_platform.device_type,
            1 - artifact.info.achieved_sparsity,
        )
        facts = exporter.facts(
            artifact.info, route.backend.label, route.policy.max_sparse_tokens
        )
        decision = Decision(
            replace(source, sha256=artifact.sha256),
            route,
            exporter.start(envs.metrics_interval(), facts),
            local_report(),
        )
        self._served = ServedModel(decision, artifact)
        if hf_config is not None:
            hf_config.quantization_config = _written_config(source, artifact, route)
        logger.info(
            "rsparse: backend %s; target sparsity %.3f, %.3f on the calibration"
            " text; artifact %s",
            route.describe(),
            artifact.info.sparsity,
            artifact.info.achieved_sparsity,
            artifact.directory,
        )

    def _artifact_source(self, model: str, revision: str | None) -> ArtifactSource:
        if self.artifact is None:
            raise ArtifactError(
                f"--quantization rsparse: {model} names no artifact in its config."
                f" {HOW_TO}"
            )
        return ArtifactSource(model, self.artifact, self.artifact_sha256, revision)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Follow a model's class that builds modules under other names.

        Args:
            hf_to_vllm_mapper: from names in the checkpoint to names in the engine.
        """

        def rename(name: str) -> str | None:
            return next(iter(hf_to_vllm_mapper.apply_list([name])), None)

        self.served.coverage.rename(rename)

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
        served = self.served
        served.require_agreement()
        names = served.claim(prefix)
        if names is None or served.route.policy.always_dense:
            return DenseLinearMethod(served)
        return RSparseLinearMethod(served, names, checkpoint_weights(None, names))


def _written_config(
    source: ArtifactSource, artifact: Artifact, route: Route
) -> dict[str, Any]:
    """What ``hf_config.quantization_config`` says from now on.

    vLLM's compile cache keys on the Hugging Face config, and neither on our config nor
    on files: with the digest and the route in there, a changed artifact cannot be
    served by a stale graph. vLLM may build our config again from it.
    """
    return {
        "quant_method": "rsparse",
        "format_version": FORMAT_VERSION,
        "artifact": source.artifact,
        "artifact_sha256": source.sha256 or artifact.sha256,
        "sparsity": artifact.info.sparsity,
        "max_sparse_tokens": route.policy.max_sparse_tokens,
        "backend": route.backend.label,
    }
