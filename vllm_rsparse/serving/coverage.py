# SPDX-License-Identifier: Apache-2.0
"""Whether an artifact and a model have the same linears. No vLLM here."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.model.engine_names import EngineNames
from vllm_rsparse.model.names import LinearName


@dataclass(frozen=True)
class BuiltModel:
    """What the engine builds, for the check and for messages.

    Attributes:
        model: name of the model.
        architecture: name of its architecture.
        layers: decoder layers of the whole model.
        staged: this process may build only some of them (pipeline parallelism).
    """

    model: str
    architecture: str
    layers: int
    staged: bool = False


class Coverage:
    """Which of an artifact's linears the layers of this process claimed."""

    def __init__(self) -> None:
        self._renames: list[Callable[[str], str | None]] = []
        self._names: EngineNames | None = None
        self._claimed: set[str] = set()
        self._dense: str | None = None

    @property
    def claimed(self) -> Collection[str]:
        """Checkpoint names of the linears that were claimed."""
        return self._claimed

    def rename(self, rename: Callable[[str], str | None]) -> None:
        """Apply the renaming of a model's class; see ``EngineNames``."""
        self._renames.append(rename)
        self._names = None

    def claim(
        self,
        artifact: Artifact,
        prefix: str,
        has: Callable[[LinearName], bool] = lambda name: True,
    ) -> list[str] | None:
        """Checkpoint names of a layer's shards, or None if the artifact lists none.

        Args:
            artifact: what was prepared.
            prefix: what the engine calls the layer.
            has: whether the checkpoint has a linear, by its name in the engine.

        Raises:
            ArtifactError: it lists some of them and not others, or lists the same
                linears in other decoder layers but not here.
        """
        if self._names is None:
            self._names = EngineNames(artifact.info.linears, self._renames)
        names = self._names.behind(prefix, has)
        listed = [name for name in names if name in artifact.info.linears]
        if len(listed) < len(names):
            _refuse_gap(artifact, names, listed)
            self._dense = self._dense or prefix
            return None
        self._claimed.update(names)
        return names

    def check(self, artifact: Artifact, built: BuiltModel) -> None:
        """Refuse an artifact that lists a linear which the model does not have.

        Called once every layer of this process exists. If the process builds only some
        of the decoder layers, a name is judged by the layers around it.

        Raises:
            ArtifactError: names the linear.
        """
        if not self._claimed:
            listed = list(artifact.info.linears)
            raise ArtifactError(
                f"{artifact.json_path}: none of its {len(listed)} linears is in the"
                f" model {built.model}: the artifact lists {listed[0]},"
                f" {built.architecture} has {self._dense}; the artifact was prepared"
                " from another model: prepare this one"
            )
        mine = {LinearName.parse(name).layer for name in self._claimed}
        for name in artifact.info.linears:
            if name in self._claimed:
                continue
            index = LinearName.parse(name).layer
            elsewhere = built.staged and index is not None and index not in mine
            if not elsewhere or index is None or index >= built.layers:
                raise ArtifactError(
                    f"{artifact.json_path}: lists {name}, which the model {built.model}"
                    f" ({built.layers} layers) does not have; the artifact was prepared"
                    " from another model: prepare this one"
                )


def _refuse_gap(
    artifact: Artifact, names: Sequence[str], listed: Sequence[str]
) -> None:
    """Refuse an artifact that lacks a linear which it should have.

    Args:
        artifact: what was prepared.
        names: checkpoint names of a fused layer's shards.
        listed: those of them that the artifact lists.

    Raises:
        ArtifactError: some shards are listed and others not, or this linear is listed
            in other decoder layers; names the missing one.
    """
    known = {LinearName.parse(name).in_any_layer for name in artifact.info.linears}
    for name in names:
        if name in listed:
            continue
        if listed or LinearName.parse(name).in_any_layer in known:
            present = listed[0] if listed else "the same linear of other layers"
            raise ArtifactError(
                f"{artifact.json_path}: {name} is missing, although {present} is"
                " listed; the artifact is incomplete or was prepared from another"
                " model: prepare this one"
            )
