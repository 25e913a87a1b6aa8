# SPDX-License-Identifier: Apache-2.0
"""``RSparseConfig``: the quantization config that vLLM sees."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from vllm_rsparse import envs
from vllm_rsparse.artifact.prepared import BASE_GONE
from vllm_rsparse.artifact.quantization import (
    HOW_TO,
    QUANT_METHOD,
)
from vllm_rsparse.artifact.reads import covered
from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.formats.checkpoints.layout import Layout
from vllm_rsparse.formats.checkpoints.on_disk import on_disk_layout
from vllm_rsparse.metrics import exporter
from vllm_rsparse.model.links import refuse_broken_links
from vllm_rsparse.serving.agreement import local_report
from vllm_rsparse.serving.base import (
    BaseQuantization,
    base_method,
    checked_first,
    require_prepared_base,
)
from vllm_rsparse.serving.decision import ArtifactSource, Decision
from vllm_rsparse.serving.dense import BaseLayer
from vllm_rsparse.serving.head import head_method
from vllm_rsparse.serving.linear import RSparseLinearMethod
from vllm_rsparse.serving.route import DenseWeights, choose_route
from vllm_rsparse.serving.served import ServedModel
from vllm_rsparse.serving.settings import (
    IN_QUANTIZATION_CONFIG,
    Settings,
    claims,
    format_of,
    served_head,
    served_head_sparsity,
    served_weights,
)
from vllm_rsparse.serving.speculation import draft_is_resolved
from vllm_rsparse.serving.weights.factory import checkpoint_weights
from vllm_rsparse.serving.weights.load_time import LoadTimeWeights

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

    If the checkpoint is quantized, everything that is not sparse belongs to the base:
    this config forwards to vLLM's own config of the checkpoint (``BaseQuantization``).

    Args:
        settings: from ``quantization_config``. None is ``--quantization rsparse`` on a
            checkpoint without one: the artifact is then named in the key ``rsparse`` of
            the model's config, or the model is refused with directions.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        self.settings = settings or Settings(IN_QUANTIZATION_CONFIG)
        dictionary = self.settings.base
        self.base = (
            None
            if dictionary is None
            else BaseQuantization(dictionary, "the checkpoint's config.json")
        )
        self._served: ServedModel | None = None

    def __getattr__(self, name: str) -> Any:
        # vLLM reads some attributes of a config by name: weight_block_size,
        # kv_cache_scheme and others, which differ between releases.
        base = self.__dict__.get("base")
        if base is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(base.config, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle in another process, perhaps on a node with other versions.

        Raises:
            NodesDisagreeError: names the node and the versions. Raised here and not
                later, when another release would already have read the rest.
        """
        self.__dict__.update(state)
        if self._served is not None:
            self._served.require_same_versions()

    @property
    def served(self) -> ServedModel:
        """The model that this config was resolved against.

        Raises:
            ValueError: it was not resolved.
        """
        if self._served is None:
            raise ValueError(
                "RSparseConfig was not resolved: call maybe_update_config(model) first"
            )
        return self._served

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        dtypes = [torch.bfloat16, torch.float16, torch.float32]
        if self.base is None:
            return dtypes
        return [d for d in dtypes if d in self.base.config.get_supported_act_dtypes()]

    @classmethod
    def get_min_capability(cls) -> int:
        # bf16 tensors and the kernels' instructions need Ampere. The supported base
        # formats need no more; schemes that do check this themselves.
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def override_quantization_method(
        cls,
        hf_quant_cfg: dict[str, Any],
        user_quant: str | None,
        hf_config: Any = None,
    ) -> str | None:
        """Serve a quantized checkpoint if the user requests rsparse for it.

        Raises:
            ArtifactError: the dictionary has our keys and no method.
        """
        return QUANT_METHOD if claims(hf_quant_cfg, user_quant, hf_config) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RSparseConfig":
        """Build from ``quantization_config``, ours or a quantized checkpoint's own.

        Raises:
            ValueError: unknown key, wrong type or value, unsupported format version, or
                a base quantization that cannot be served sparse.
        """
        return cls(Settings.of_quantization_config(config))

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
        refuse_broken_links(Path(model_name), BASE_GONE)
        self._refuse_online_quantization()
        overrides = Settings.of_overrides(hf_config)
        if self.base is not None:
            self.base.update(model_name, hf_config, revision)
        source = self._artifact_source(overrides, model_name, revision)
        artifact = source.open()
        require_prepared_base(artifact, self.base, model_name)
        dictionaries = [overrides, self.settings]
        on_disk = self.settings.weights_on_disk
        weights = served_weights(dictionaries, artifact.info, model_name)
        head = served_head(dictionaries, artifact.info)
        head_sparsity = served_head_sparsity(dictionaries, artifact.info)
        route = choose_route(
            [settings.route for settings in dictionaries],
            current_platform.device_type,
            1 - artifact.info.achieved_sparsity,
            format_of(weights, artifact.info),
            on_disk,
        )
        facts = exporter.facts(
            artifact.info, route.backend.label, route.policy.max_sparse_tokens
        )
        source = replace(source, sha256=artifact.sha256)
        # The metrics are those of the served model.
        draft = draft_is_resolved(model_name)
        metrics = None if draft else exporter.start(envs.metrics_interval(), facts)
        decision = Decision(
            source, route, weights, head, head_sparsity, metrics, local_report()
        )
        self._served = ServedModel(decision, artifact)
        if hf_config is not None:
            dictionary = None if self.base is None else self.base.dictionary
            hf_config.quantization_config = decision.quantization_config(
                artifact.info.sparsity, dictionary, on_disk
            )
        logger.info(
            "rsparse: backend %s; target sparsity %.3f, %.3f on the calibration"
            " text; %d linears%s; artifact %s",
            route.describe(),
            artifact.info.sparsity,
            artifact.info.achieved_sparsity,
            len(artifact.info.linears),
            covered(artifact.info),
            artifact.directory,
        )

    def _refuse_online_quantization(self) -> None:
        if getattr(self, "online_quantization_config", None) is not None:
            raise ArtifactError(
                "--quantization-config cannot be combined with rsparse: it quantizes"
                " weights that the artifact was not prepared for. Leave it out, or"
                " prepare a quantized checkpoint of the model"
            )

    def _artifact_source(
        self, overrides: Settings, model: str, revision: str | None
    ) -> ArtifactSource:
        # A digest belongs to the artifact that is named next to it.
        chosen = self.settings if overrides.artifact is None else overrides
        if chosen.artifact is None:
            raise ArtifactError(
                f"--quantization rsparse: {model} names no artifact in its config."
                f" {HOW_TO}"
            )
        digest = overrides.artifact_sha256 or chosen.artifact_sha256
        return ArtifactSource(
            model, chosen.artifact, digest, revision, f"{chosen.where}.artifact"
        )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Apply the renaming of a model's class that builds modules under other names.

        Args:
            hf_to_vllm_mapper: from names in the checkpoint to names in the engine.
        """

        def rename(name: str) -> str | None:
            return next(iter(hf_to_vllm_mapper.apply_list([name])), None)

        self.served.coverage.rename(rename)
        if self.base is not None:
            self.base.config.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        """The sparse method for a linear that the artifact lists, else the base's own.

        Raises:
            ArtifactError: the artifact lists some shards of a fused layer and not
                others, or lists such a linear in other decoder layers but not here.
            CheckpointError: the checkpoint's layout of a listed linear is not served.
            NodesDisagreeError: a rank has another artifact, route or version.
        """
        method = base_method(self.base, layer, prefix, self.packed_modules_mapping)
        served = self.served
        head = served.head
        if head is not None and isinstance(layer, VocabParallelEmbedding):
            return head_method(served, head, layer, method)
        if not isinstance(layer, LinearBase):
            return method
        served.require_agreement()
        names = served.claim(prefix)
        on_disk = self.settings.weights_on_disk
        # The base's own method cannot read what ``prepare`` wrote.
        if names is None or (served.route.policy.always_dense and on_disk is None):
            return checked_first(served, method)
        if on_disk is not None:
            layout: Layout | None = on_disk_layout(on_disk)
        else:
            layout = None if self.base is None else self.base.layout(names, method)
        weights = checkpoint_weights(layout, names)
        if served.load_time is not None and on_disk is None:
            weights = LoadTimeWeights(weights, served.load_time, served.artifact, names)
        separate = served.route.dense_weights is DenseWeights.SEPARATE
        dense = BaseLayer(method, names) if separate else None
        return RSparseLinearMethod(served, names, weights, dense)

    # vLLM's class has the next two as static methods and calls them on an instance.
    def get_cache_scale_mapper(self) -> "WeightsMapper":
        """See the base class."""
        if self.base is not None:
            return self.base.config.get_cache_scale_mapper()
        return super().get_cache_scale_mapper()

    def get_checkpoint_weight_mapper(self) -> "WeightsMapper":
        """See the base class; releases before 0.31 do not have it and do not ask."""
        if self.base is not None:
            return self.base.config.get_checkpoint_weight_mapper()
        return super().get_checkpoint_weight_mapper()

    @property
    def _ignore_unexpected_suffixes(self) -> tuple[str, ...]:
        owner = QuantizationConfig if self.base is None else self.base.config
        return owner._ignore_unexpected_suffixes
