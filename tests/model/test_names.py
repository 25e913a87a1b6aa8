# SPDX-License-Identifier: Apache-2.0
"""Names of linears: taken apart, put together, and found behind the engine's layers."""

import pytest

from vllm_rsparse.model.engine_names import EngineNames
from vllm_rsparse.model.families import DENSE, by_engine_layer, kind_of
from vllm_rsparse.model.names import LinearName

ATTENTION = "model.layers.3.self_attn"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.3.self_attn.q_proj", ("model.layers", 3, "self_attn.q_proj")),
        ("a.b.layers.0.x", ("a.b.layers", 0, "x")),
        # The first number is the layer's: later ones are the kind's own.
        ("layers.12.mlp.experts.5.up", ("layers", 12, "mlp.experts.5.up")),
        ("0.q_proj", ("", 0, "q_proj")),
        ("lm_head", ("", None, "lm_head")),
        ("layers.1", ("", None, "layers.1")),
        # No engine writes an index so, and the name must come back as it was.
        ("layers.03.x", ("", None, "layers.03.x")),
        (f"layers.{'9' * 5000}.x", ("", None, f"layers.{'9' * 5000}.x")),
        ("", ("", None, "")),
    ],
)
def test_a_name_is_taken_apart_and_put_together(
    name: str, parts: tuple[str, int | None, str]
) -> None:
    parsed = LinearName.parse(name)
    assert (parsed.path, parsed.layer, parsed.kind) == parts
    assert str(parsed) == name


def test_label_is_the_last_word() -> None:
    assert LinearName.parse("model.layers.3.self_attn.q_proj").label == "q_proj"
    assert LinearName.parse("lm_head").label == "lm_head"


def names(*labels: str) -> list[str]:
    return [f"{ATTENTION}.{label}" for label in labels]


def test_a_fused_layer_has_its_shards_behind_it() -> None:
    listed = names("v_proj", "q_proj", "k_proj", "o_proj")
    engine = EngineNames(listed)
    qkv = names("q_proj", "k_proj", "v_proj")
    assert engine.behind(f"{ATTENTION}.qkv_proj") == qkv
    assert engine.behind(f"{ATTENTION}.o_proj") == names("o_proj")
    # An engine's class that does not fuse.
    assert engine.behind(f"{ATTENTION}.k_proj") == names("k_proj")
    assert engine.behind("vision.proj") == ["vision.proj"]


def test_a_shard_that_is_not_listed_is_named() -> None:
    behind = EngineNames(names("q_proj")).behind(f"{ATTENTION}.qkv_proj")
    assert behind == names("q_proj", "k_proj", "v_proj")


def test_keys_stand_for_values_where_the_checkpoint_has_none() -> None:
    engine = EngineNames(names("q_proj", "k_proj"))

    def behind(has_values: bool) -> list[str]:
        return engine.behind(f"{ATTENTION}.qkv_proj", lambda name: has_values)

    assert behind(has_values=False) == names("q_proj", "k_proj", "k_proj")
    # An artifact that lacks them is incomplete.
    assert behind(has_values=True) == names("q_proj", "k_proj", "v_proj")


def test_a_draft_model_has_its_own_prefix() -> None:
    engine = EngineNames(names("gate_proj"))
    assert engine.behind(f"draft_model.{ATTENTION}.gate_proj") == names("gate_proj")


def test_renamed_modules_are_found_by_the_names_in_the_checkpoint() -> None:
    listed = ["model.language_model.layers.0.self_attn.o_proj", "dropped.0.x"]

    def outer(name: str) -> str | None:
        if name.startswith("dropped"):
            return None
        return name.replace("model.language_model.", "language_model.model.", 1)

    def inner(name: str) -> str:
        return name.replace(".q_proj", ".qkv_proj")

    engine = EngineNames(listed, [outer, inner])
    assert engine.behind("language_model.model.layers.0.self_attn.o_proj") == listed[:1]


def test_layers_of_the_engine_are_grouped_in_its_order() -> None:
    listed = [
        f"model.layers.{layer}.{kind.name}" for layer in (1, 0) for kind in DENSE.spec
    ]
    groups = by_engine_layer(reversed(listed))
    assert len(groups) == 2 * 4
    assert names("q_proj", "k_proj", "v_proj") in [
        [name.replace(".1.", ".3.") for name in group] for group in groups
    ]
    assert sorted(name for group in groups for name in group) == sorted(listed)
    assert by_engine_layer(["a.0.x", "a.0.y"]) == [["a.0.x"], ["a.0.y"]]


def test_the_input_of_a_group_is_taken_from_its_first_kind() -> None:
    for kind in DENSE.spec:
        source = kind_of(kind.input_group)
        assert source.input_group == source.name
        assert kind.engine_layer == source.engine_layer
