# SPDX-License-Identifier: Apache-2.0
"""Complete a staged directory: what the engine reads next to the artifact's tensors."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch

from vllm_rsparse import __version__
from vllm_rsparse.artifact.card import LOSS
from vllm_rsparse.artifact.quantization import QUANT_METHOD, QuantizationSettings
from vllm_rsparse.artifact.reads import HEAD_FOUND, TOKEN_READS
from vllm_rsparse.artifact.schema import ArtifactInfo, BaseWeights
from vllm_rsparse.artifact.tensors import (
    ARTIFACT_DIR,
    JSON_NAME,
    Artifact,
    file_sha256,
)
from vllm_rsparse.artifact.versions import write_info
from vllm_rsparse.formats.names import AS_STORED
from vllm_rsparse.model.language_model import LanguageModel
from vllm_rsparse.model.linears import Linear
from vllm_rsparse.model.quantized import OLD_KEY, base_quantization
from vllm_rsparse.model.reads import token_reads
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.calibration.head import CalibratedHead
from vllm_rsparse.prepare.calibration.layers import Calibrated, Job
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.recipe.recipes import Recipe
from vllm_rsparse.prepare.search.price import Priced
from vllm_rsparse.prepare.store.files import write_text
from vllm_rsparse.prepare.store.output import StagedOutput
from vllm_rsparse.prepare.store.quantized_copy import QuantizedCopy
from vllm_rsparse.texts.windows import CalibrationText


@dataclass(frozen=True, eq=False)
class Directories:
    """What all directories of one run have in common.

    Attributes:
        options: of the run.
        recipe: what the user asked for.
        model: the base model.
        linears: all linears that take part.
        base: how the base model stores its weights.
        text: the calibration text.
        quantized_copy: the weights to write, where the base's files do not do.
        priced: how the sparsity was found; None where it was given.
    """

    options: PrepareOptions
    recipe: Recipe
    model: StreamedModel
    linears: Sequence[Linear]
    base: BaseWeights
    text: CalibrationText
    quantized_copy: QuantizedCopy | None = None
    priced: Priced | None = None

    def write(
        self, staged: StagedOutput, job: Job, calibrated: Calibrated
    ) -> ArtifactInfo:
        """Write everything but the artifact's tensors, which are there.

        Args:
            staged: the directory.
            job: that wrote the tensors.
            calibrated: what it found.

        Returns:
            What was written to ``rsparse.json``.
        """
        checkpoint, options = self.model.checkpoint, self.options
        info = self._info(job, calibrated, file_sha256(job.path))
        write_text(staged.artifact / JSON_NAME, write_info(info))
        # Read back as the engine will: our own errors show here and not while serving.
        Artifact(staged.artifact)
        copy = self.quantized_copy
        staged.add_base_files(checkpoint, options.copy_weights, weights=copy is None)
        if copy is not None:
            copy.write(staged.path)
        load_time = self.model.load_time
        quantization = QuantizationSettings(
            quant_method=QUANT_METHOD,
            artifact=ARTIFACT_DIR,
            artifact_sha256=info.tensors_sha256,
            sparsity=info.sparsity,
            weights=None if load_time is None else load_time.name,
            head=None if options.head == AS_STORED else options.head,
            head_sparsity=options.head_sparsity or None,
            weights_on_disk=None if copy is None else options.weights,
            base=base_quantization(checkpoint.config),
        )
        # The older name of the key: vLLM would read it as well.
        config = {k: v for k, v in checkpoint.config.items() if k != OLD_KEY}
        staged.write_config(config | {"quantization_config": quantization.to_dict()})
        return info

    def _info(self, job: Job, calibrated: Calibrated, digest: str) -> ArtifactInfo:
        return ArtifactInfo(
            sparsity=job.sparsity,
            linears=calibrated.entries,
            dtype=self.base.dtype,
            tensors_sha256=digest,
            base=self.base,
            weights=self.options.weights,
            head=self.options.head,
            sparse_head=None if calibrated.head is None else calibrated.head.entry,
            provenance=self._provenance(job, calibrated),
        )

    def _provenance(self, job: Job, calibrated: Calibrated) -> dict[str, Any]:
        model, recipe, planned = self.model, self.recipe, job.planned
        found: dict[str, Any] = {}
        if self.priced is not None:
            found[LOSS] = asdict(self.priced.loss)
        return found | {
            "vllm_rsparse": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "base_model": self.options.model,
            "base_directory": str(model.checkpoint.directory),
            "recipe": {
                "name": recipe.name,
                "sparsity": job.sparsity,
                "rho": recipe.rho,
            },
            "method": {
                "score": recipe.score,
                "allocation": recipe.allocation,
                "activations": recipe.activations,
                "correction": planned.corrected,
                "factors": recipe.factors,
                "trials": dict(planned.trials),
            },
            "calibration": self.text.provenance
            | {
                "device": model.device.type,
                "dtype": str(model.dtype).removeprefix("torch."),
            },
            TOKEN_READS: asdict(
                token_reads(LanguageModel(model.checkpoint), self.linears)
            ),
            "svd": {"largest_residual": calibrated.residuals},
            **_head_provenance(calibrated.head),
        }


def _head_provenance(head: CalibratedHead | None) -> dict[str, Any]:
    """What the output layer alone loses; empty where it is the base model's."""
    if head is None:
        return {}
    found = {
        "shape": list(head.shape),
        "kl_divergence": head.divergence,
        "tokens": head.tokens,
    }
    return {HEAD_FOUND: found}
