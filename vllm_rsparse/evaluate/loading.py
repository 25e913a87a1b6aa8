# SPDX-License-Identifier: Apache-2.0
"""A prepared directory as a PyTorch model whose linears can be switched to sparse."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_rsparse.artifact.locate import locate_artifact
from vllm_rsparse.artifact.schema import LinearEntry
from vllm_rsparse.artifact.tensors import Artifact, file_sha256
from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.model.attention import attention_implementation
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.op.reference import kept_mask


@dataclass(frozen=True)
class PreparedModel:
    """An opened prepared directory: its artifact and the weights it belongs to.

    Attributes:
        directory: its path.
        artifact: the opened artifact; its digest agrees with both JSON files.
        weight_files: the base model's safetensors files, links resolved.
    """

    directory: Path
    artifact: Artifact
    weight_files: tuple[Path, ...]

    @classmethod
    def open(cls, directory: Path) -> "PreparedModel":
        """Read config and artifact.

        Raises:
            ArtifactError: not a prepared directory, or the artifact is damaged.
        """
        where = directory / "config.json"
        try:
            config = json.loads(where.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{where}: cannot be read as JSON ({error}); give a directory that"
                " `vllm-rsparse prepare` wrote"
            ) from error
        quantization = config.get("quantization_config") or {}
        if quantization.get("quant_method") != "rsparse":
            raise ArtifactError(
                f"{where}: quantization_config.quant_method is"
                f" {quantization.get('quant_method')!r}, not 'rsparse'; give a"
                " directory that `vllm-rsparse prepare` wrote"
            )
        source = quantization.get("artifact")
        if not isinstance(source, str):
            raise ArtifactError(f"{where}: quantization_config.artifact is missing")
        artifact = Artifact(locate_artifact(source, str(directory)))
        artifact.verify_digest(quantization.get("artifact_sha256"))
        weights = sorted(directory.glob("*.safetensors"))
        if not weights:
            raise ArtifactError(
                f"{directory}: has no safetensors files, so there is no model to run"
            )
        return cls(directory, artifact, tuple(file.resolve() for file in weights))

    @property
    def recipe(self) -> str:
        """Name of the recipe that made it, from its provenance."""
        recipe = self.artifact.info.provenance.get("recipe")
        name = recipe.get("name") if isinstance(recipe, dict) else None
        return str(name or self.directory.name)

    def same_base(self, other: "PreparedModel") -> bool:
        """Whether both have the same weights (the same files, or equal content)."""
        if self.weight_files == other.weight_files:
            return True
        mine, others = self.weight_files, other.weight_files
        return [file.stat().st_size for file in mine] == [
            file.stat().st_size for file in others
        ] and all(
            file_sha256(a) == file_sha256(b) for a, b in zip(mine, others, strict=True)
        )


class SwitchableLinear(nn.Module):
    """A linear that is dense, or sparse from a given position of the window on.

    Attributes:
        dense_tokens: leading positions of each window that stay dense; None makes all
            of them dense.
        kept: channels kept, summed over the sparse tokens seen so far.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.dense_tokens: int | None = None
        self.kept = 0
        self.thresholds: Tensor | None = None
        self.u: Tensor | None = None
        self.v: Tensor | None = None
        self.correction: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[windows, positions, K] -> [windows, positions, N]."""
        if self.dense_tokens is None or self.thresholds is None:
            return self.linear(x)
        exact, rest = x[:, : self.dense_tokens], x[:, self.dense_tokens :]
        mask = kept_mask(rest, self.thresholds)
        self.kept += int(mask.sum())
        y = self.linear(rest.masked_fill(~mask, 0))
        if self.u is not None and self.v is not None:
            dropped = rest.masked_fill(mask, 0)
            y = y + functional.linear(functional.linear(dropped, self.v), self.u)
        if self.correction is not None:
            y = y + self.correction
        return torch.cat([self.linear(exact), y], dim=1)


class SwitchableModel:
    """The base model with every linear that an artifact lists made switchable.

    Args:
        prepared: the directory to load the base model from.
        device: where to run.
        dtype: dtype of weights and activations.

    Raises:
        ArtifactError: transformers cannot load the model, or it lacks a linear.
    """

    def __init__(
        self, prepared: PreparedModel, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.model = _load_base(prepared.directory, dtype).to(device)
        self.linears: dict[str, SwitchableLinear] = {}

    def use(self, artifact: Artifact) -> None:
        """Install an artifact's thresholds, factors and corrections; counters restart.

        Raises:
            ArtifactError: the artifact belongs to another model.
        """
        for name, entry in artifact.info.linears.items():
            module = self._switchable(name, entry, artifact)
            tensors = artifact.read(name)
            module.thresholds = tensors.thresholds.to(self.device)
            module.u = self._cast(tensors.u)
            module.v = self._cast(tensors.v)
            module.correction = self._cast(tensors.correction)
            module.kept = 0
        for name in self.linears.keys() - artifact.info.linears.keys():
            self.linears[name].thresholds = None

    def check_window(self, window: int) -> None:
        """Refuse windows longer than the model's positions (ValueError)."""
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest and window > longest:
            raise ValueError(
                f"--window {window} is more than the model's length of {longest}"
                " (max_position_embeddings)"
            )

    @torch.inference_mode()
    def logits(self, windows: Tensor, first: int, sparse: bool) -> Tensor:
        """Logits from position ``first`` of each window on.

        Args:
            windows: int64 [windows, positions].
            first: positions before it are always dense.
            sparse: whether the later ones are sparse, or dense too.

        Returns:
            [windows, positions - first, vocabulary] in the compute dtype.
        """
        for module in self.linears.values():
            module.dense_tokens = first if sparse else None
        return self.model(
            input_ids=windows.to(self.device),
            use_cache=False,
            logits_to_keep=windows.shape[1] - first,
        ).logits

    def _switchable(
        self, name: str, entry: LinearEntry, artifact: Artifact
    ) -> SwitchableLinear:
        if name not in self.linears:
            try:
                linear = self.model.get_submodule(name)
            except AttributeError:
                linear = None
            if not isinstance(linear, nn.Linear):
                raise ArtifactError(
                    f"{artifact.json_path}: lists {name}, which this model does not"
                    " have; the artifact belongs to another model"
                )
            self.linears[name] = SwitchableLinear(linear)
            self.model.set_submodule(name, self.linears[name])
        shape = tuple(self.linears[name].linear.weight.shape)
        if shape != entry.shape:
            raise ArtifactError(
                f"{artifact.json_path}: {name} is {list(entry.shape)}, but the model's"
                f" is {list(shape)}; the artifact belongs to another model"
            )
        return self.linears[name]

    def _cast(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.device, self.dtype)


def _load_base(directory: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        checkpoint = Checkpoint(directory)
        config = AutoConfig.from_pretrained(directory)
        # transformers would look for a quantizer of this name.
        del config.quantization_config
        settings = {
            "config": config,
            "dtype": dtype,
            "attn_implementation": attention_implementation(config),
        }
        if not checkpoint.quantized:
            model = AutoModelForCausalLM.from_pretrained(directory, **settings)
        else:
            with torch.device("meta"):
                architecture = type(AutoModelForCausalLM.from_config(config))
            weights = checkpoint.read(checkpoint.plain_names(), dequantised=dtype)
            model = architecture.from_pretrained(None, state_dict=weights, **settings)
    # Unknown architectures, remote code, broken weights: each its own exception.
    except Exception as error:
        raise ArtifactError(
            f"{directory}: transformers cannot load the base model ({error})"
        ) from error
    return model.eval()
