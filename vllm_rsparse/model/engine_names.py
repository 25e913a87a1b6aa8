# SPDX-License-Identifier: Apache-2.0
"""Which linears of a checkpoint stand behind a layer that the engine builds."""

from collections.abc import Callable, Iterable

from vllm_rsparse.model.families import kinds_of_engine_layer
from vllm_rsparse.model.names import LinearName

# What vLLM puts in front of every name of a draft model.
_DRAFT = "draft_model."


class EngineNames:
    """The linears that an artifact lists, by the engine's names for them.

    Args:
        listed: the artifact's names, which are the checkpoint's.
        rename: a checkpoint's name -> the engine's, or None for what it does not load.
    """

    def __init__(
        self,
        listed: Iterable[str],
        rename: Callable[[str], str | None] = lambda name: name,
    ) -> None:
        self._listed = {rename(name) or name: name for name in listed}

    def behind(self, prefix: str) -> list[str]:
        """Checkpoint names of a layer's shards, in the order of its output.

        A shard that the artifact does not list has its name in the engine.

        Args:
            prefix: what the engine calls the layer,
                "model.layers.0.self_attn.qkv_proj".
        """
        layer = LinearName.parse(prefix.removeprefix(_DRAFT))
        if str(layer) in self._listed:
            return [self._listed[str(layer)]]
        shards = [
            str(layer.of_kind(kind.name)) for kind in kinds_of_engine_layer(layer.kind)
        ]
        return [self._listed.get(shard, shard) for shard in shards]
