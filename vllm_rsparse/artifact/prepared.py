# SPDX-License-Identifier: Apache-2.0
"""``PreparedDirectory``: what ``prepare`` wrote, opened. No vLLM here."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_rsparse.artifact.locate import holds_artifact, locate_artifact
from vllm_rsparse.artifact.quantization import QuantizationSettings, read_quantization
from vllm_rsparse.artifact.tensors import JSON_NAME, Artifact, file_sha256
from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.links import refuse_broken_links
from vllm_rsparse.validation import read_json

GIVE = "pass a directory that `vllm-rsparse prepare` wrote"
BASE_GONE = (
    "the base model was moved or deleted: put it back, or prepare again with"
    " --copy-weights, which copies the base's files instead of linking to them"
)


@dataclass(frozen=True)
class PreparedDirectory:
    """A prepared directory: a model's config, its artifact, and the base's weights.

    Attributes:
        path: where it is.
        config: the content of config.json.
        settings: its ``quantization_config``.
        artifact: opened; its digest agrees with both JSON files.
    """

    path: Path
    config: dict[str, Any]
    settings: QuantizationSettings
    artifact: Artifact

    @classmethod
    def open(cls, path: Path) -> "PreparedDirectory":
        """Read config and artifact. The weights are not needed for that.

        Raises:
            ArtifactError: not a prepared directory, or the artifact is damaged.
        """
        _require_directory(path)
        if holds_artifact(path):
            raise ArtifactError(
                f"{path}: is an artifact without its model; pass the prepared directory"
                " that contains it"
            )
        where = path / "config.json"
        config = read_json(where, ArtifactError, f"; {GIVE}")
        if "quantization_config" not in config:
            raise ArtifactError(f"{where}: has no quantization_config; {GIVE}")
        settings = read_quantization(
            config["quantization_config"], f"{where}: quantization_config"
        )
        if settings.quant_method is None or settings.artifact is None:
            raise ArtifactError(
                f"{where}: quantization_config lacks quant_method or artifact; {GIVE}"
            )
        artifact = Artifact(locate_artifact(settings.artifact, str(path)))
        artifact.verify_digest(settings.artifact_sha256)
        return cls(path, config, settings, artifact)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The base model's files, as the directory links to them.

        Raises:
            CheckpointError: a link leads nowhere, or a file is missing or damaged.
        """
        refuse_broken_links(self.path, BASE_GONE)
        return Checkpoint(self.path)

    @property
    def recipe(self) -> str:
        """Name of the recipe that made it, from its provenance."""
        recipe = self.artifact.info.provenance.get("recipe")
        name = recipe.get("name") if isinstance(recipe, dict) else None
        return str(name or self.path.name)

    def same_base(self, other: "PreparedDirectory") -> bool:
        """Whether both have the same weights (the same files, or equal content).

        Raises:
            CheckpointError: as for ``checkpoint``.
        """
        mine = [file.resolve() for file in self.checkpoint.weight_files]
        others = [file.resolve() for file in other.checkpoint.weight_files]
        if mine == others:
            return True
        return [file.stat().st_size for file in mine] == [
            file.stat().st_size for file in others
        ] and all(
            file_sha256(a) == file_sha256(b) for a, b in zip(mine, others, strict=True)
        )


def open_artifact(directory: Path) -> Artifact:
    """The artifact of a prepared directory, or of a directory that is one itself.

    Raises:
        ArtifactError: it is neither, or the artifact is damaged.
    """
    if holds_artifact(directory):
        artifact = Artifact(directory)
        artifact.verify_digest()
        return artifact
    _require_directory(directory)
    if not (directory / "config.json").is_file():
        raise ArtifactError(
            f"{directory}: neither a prepared directory (no config.json) nor an"
            f" artifact (no {JSON_NAME}); {GIVE}"
        )
    return PreparedDirectory.open(directory).artifact


def _require_directory(path: Path) -> None:
    """Refuse a path at which there is nothing, or a file."""
    if not path.is_dir():
        found = "is a file" if path.exists() else "there is no such directory"
        raise ArtifactError(f"{path}: {found}; {GIVE}")
