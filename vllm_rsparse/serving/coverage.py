# SPDX-License-Identifier: Apache-2.0
"""Whether an artifact and a model list the same linears. No vLLM here."""

from collections.abc import Collection

from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.model.names import LinearName


def refuse_gap(artifact: Artifact, names: list[str], listed: list[str]) -> None:
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
            beside = listed[0] if listed else "the same linear of other layers"
            raise ArtifactError(
                f"{artifact.json_path}: {name} is missing, although {beside} is"
                " listed; the artifact is incomplete or was prepared from another"
                " model: prepare this one"
            )


def refuse_unclaimed(
    artifact: Artifact,
    claimed: Collection[str],
    *,
    model: str,
    layers: int,
    staged: bool,
) -> None:
    """Refuse an artifact that lists a linear which the model does not have.

    Args:
        artifact: what was prepared.
        claimed: names that this worker's layers took.
        model: its name, for the message.
        layers: decoder layers of the whole model.
        staged: this worker may build only some of them (pipeline parallelism); a name
            is then judged by the layers around it.

    Raises:
        ArtifactError: names the linear.
    """
    mine = {LinearName.parse(name).layer for name in claimed}
    for name in artifact.info.linears:
        if name in claimed:
            continue
        index = LinearName.parse(name).layer
        elsewhere = staged and index is not None and index not in mine
        if not elsewhere or index is None or index >= layers:
            raise ArtifactError(
                f"{artifact.json_path}: lists {name}, which the model {model}"
                f" ({layers} layers) does not have; the artifact was prepared from"
                " another model: prepare this one"
            )
