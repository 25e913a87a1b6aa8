# SPDX-License-Identifier: Apache-2.0
"""What the API server decides about a model, for every worker."""

from dataclasses import dataclass
from typing import Any

from vllm_rsparse.artifact.locate import PARAMETER, locate_artifact
from vllm_rsparse.artifact.quantization import QUANT_METHOD, QuantizationSettings
from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.metrics.counters import Settings as Counting
from vllm_rsparse.serving.agreement import Report
from vllm_rsparse.serving.route import Route


@dataclass(frozen=True)
class ArtifactSource:
    """Where the artifact of a model is, and which one it must be.

    Attributes:
        model: the served model, a directory or a Hub repository.
        artifact: see ``locate_artifact``.
        sha256: digest that the tensor file must have, or None.
        revision: of the model's repository.
        parameter: what users call the setting that names the artifact, for messages.
    """

    model: str
    artifact: str
    sha256: str | None = None
    revision: str | None = None
    parameter: str = PARAMETER

    def open(self) -> Artifact:
        """Locate, validate and check the artifact against its digest.

        Raises:
            ArtifactError: it cannot be found, or it is damaged.
        """
        directory = locate_artifact(
            self.artifact, self.model, self.revision, self.parameter
        )
        artifact = Artifact(directory)
        artifact.verify_digest(self.sha256)
        return artifact


@dataclass(frozen=True)
class Decision:
    """What the API server decided about a model. It is pickled to every worker.

    Attributes:
        source: where the artifact is, with the digest of the one that was found.
        route: which backend, and which steps are sparse.
        weights: "as-stored", or the format that the weights of the artifact's linears
            are quantized to while they load.
        head: the same for the output layer.
        head_sparsity: what the output layer was prepared for; 0: every step of it is
            dense.
        metrics: where and how often to count; None: metrics are off.
        resolved_on: the node that decided, and its versions.
    """

    source: ArtifactSource
    route: Route
    weights: str
    head: str
    head_sparsity: float
    metrics: Counting | None
    resolved_on: Report

    def quantization_config(
        self,
        sparsity: float,
        base: dict[str, Any] | None,
        weights_on_disk: str | None = None,
    ) -> dict[str, Any]:
        """The new content of ``hf_config.quantization_config``.

        vLLM's compile cache keys on the Hugging Face config, and neither on our config
        nor on files: with the digest and the route in there, a changed artifact cannot
        be served by a stale graph. vLLM may build our config again from it.

        Args:
            sparsity: the artifact's target.
            base: the checkpoint's own dictionary, or None if it is not quantized.
            weights_on_disk: format of the linears in its files, where ``prepare`` wrote
                them.
        """
        return QuantizationSettings(
            quant_method=QUANT_METHOD,
            artifact=self.source.artifact,
            artifact_sha256=self.source.sha256,
            sparsity=sparsity,
            max_sparse_tokens=self.route.policy.max_sparse_tokens,
            backend=self.route.backend.label,
            dense_weights=str(self.route.dense_weights),
            weights=self.weights,
            head=self.head,
            head_sparsity=self.head_sparsity,
            weights_on_disk=weights_on_disk,
            base=base,
        ).to_dict()
