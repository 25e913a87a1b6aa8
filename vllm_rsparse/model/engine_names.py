# SPDX-License-Identifier: Apache-2.0
"""Which linears of a checkpoint correspond to a layer that the engine builds."""

from collections.abc import Callable, Iterable

from vllm_rsparse.model.families import kinds_of_engine_layer
from vllm_rsparse.model.names import LinearName

# Prefix that vLLM adds to every name of a draft model.
_DRAFT = "draft_model."


class EngineNames:
    """The linears that an artifact lists, by the engine's names for them.

    Args:
        listed: the artifact's names, which are the checkpoint's.
        renames: how the model's classes rename their modules: old name -> new name, or
            None for a module that the class does not load. There may be several: a
            wrapper's class renames the language model, whose own class is asked
            afterwards.
    """

    def __init__(
        self, listed: Iterable[str], renames: Iterable[Callable[[str], str | None]] = ()
    ) -> None:
        self._listed = {name: name for name in listed}
        for rename in renames:
            self._move(rename)

    def behind(
        self, prefix: str, has: Callable[[LinearName], bool] = lambda name: True
    ) -> list[str]:
        """Checkpoint names of a layer's shards, in the order of its output.

        A shard that the artifact does not list has its name in the engine.

        Args:
            prefix: what the engine calls the layer,
                "model.layers.0.self_attn.qkv_proj".
            has: whether the checkpoint has a linear, by config.json and its name in the
                engine; asked only where the artifact does not list it.
        """
        layer = LinearName.parse(prefix.removeprefix(_DRAFT))
        if str(layer) in self._listed:
            return [self._listed[str(layer)]]
        shards = []
        for kind in kinds_of_engine_layer(layer.kind):
            shard = layer.of_kind(kind.name)
            if kind.copied and str(shard) not in self._listed and not has(shard):
                shard = layer.of_kind(kind.copied)
            shards.append(str(shard))
        return [self._listed.get(shard, shard) for shard in shards]

    def _move(self, rename: Callable[[str], str | None]) -> None:
        moved = {}
        for engine_name, name in self._listed.items():
            new = rename(engine_name)
            # Fusing is the table's business; a class that moves q, k and v to one name
            # would leave one of them.
            if new and LinearName.parse(new).kind == LinearName.parse(engine_name).kind:
                moved[new] = name
        self._listed |= moved
