# SPDX-License-Identifier: Apache-2.0
"""Every family through ``prepare`` and ``evaluate``, on small random checkpoints.

What they compute is compared with the whole model in transformers, whose linears have
the formula written out here.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.cli import main
from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.evaluate.loading import SwitchableModel
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.families import family_of
from vllm_rsparse.model.linears import find_linears
from vllm_rsparse.testing.families import FAMILIES, PARTS, separate

LAYERS = 2
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    # Large weights: logits far apart, so that an error shows.
    "initializer_range": 0.3,
}


@pytest.fixture(params=FAMILIES)
def base(request: Any, tmp_path: Path, pyllama: Path) -> Path:
    """A random checkpoint of the family, with the reference model's tokenizer."""
    torch.manual_seed(0)
    directory = tmp_path / "base"
    FAMILIES[request.param].save(directory, SIZES)
    for file in pyllama.glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def test_layer_types_by_list_and_by_interval(tmp_path: Path) -> None:
    hybrid = family_of({"architectures": ["Qwen3_5ForCausalLM"]})
    types = ["linear_attention", "linear_attention", "full_attention"]
    for config in ({"layer_types": types}, {"full_attention_interval": 3}):
        attention = [
            any(kind.label == "q_proj" for kind in hybrid.layer(config, index))
            for index in range(3)
        ]
        assert attention == [False, False, True]
    FAMILIES["Qwen3.5"].save(tmp_path, SIZES)
    config = json.loads((tmp_path / "config.json").read_text())
    config["layer_types"] = ["linear_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="type of layer 1"):
        find_linears(Checkpoint(tmp_path))


def test_linears_have_their_weights_wherever_these_are(base: Path) -> None:
    checkpoint = Checkpoint(base)
    linears, dtype = find_linears(checkpoint)
    weights = separate(checkpoint.read(checkpoint.tensors), SIZES)
    shapes = {f"{one.name}.weight": one.shape for one in linears}
    assert dtype == "float32"
    assert shapes == {
        name: tuple(weight.shape)
        for name, weight in weights.items()
        if name.endswith(".weight")
    }
    assert shapes


@pytest.mark.parametrize("recipe", ["best", "wina"])
def test_evaluate_gives_what_the_sparse_model_computes(
    base: Path, tmp_path: Path, held_out: Path, recipe: str
) -> None:
    prepared = tmp_path / "prepared"
    arguments = ["--sparsity", "0.5", "--recipe", recipe, "--device", "cpu"]
    arguments += ["--calibration-samples", "2", "--calibration-tokens", "128"]
    arguments += ["--calibration-data", str(held_out)]
    if recipe == "wina":
        arguments += ["--rho", "0.8"]  # factors in every linear
    assert main(["prepare", str(base), str(prepared), *arguments]) == 0

    opened = PreparedDirectory.open(prepared)
    model = SwitchableModel(opened.checkpoint, torch.device("cpu"), torch.float32)
    model.use(opened.artifact)
    tokens = torch.randint(2, SIZES["vocab_size"], (1, 48))
    sparse, dense = (model.logits(tokens, 0, sparse) for sparse in (True, False))
    whole = _whole_model(base)
    with torch.no_grad():
        torch.testing.assert_close(dense, whole(tokens).logits, rtol=1e-4, atol=1e-4)
        _make_sparse(whole, prepared)
        expected = whole(tokens).logits
    # A channel at its threshold may fall either way under another order of sums; the
    # bulk agrees to float32 rounding.
    error = (sparse - expected).abs()
    assert error.median() < 1e-3 * expected.abs().median()
    assert error.mean() < 0.05 * (dense - expected).abs().mean()


def _whole_model(base: Path) -> Any:
    (architecture,) = json.loads((base / "config.json").read_text())["architectures"]
    # transformers' fused attention leaves out the soft cap of Gemma 2.
    return (
        getattr(transformers, architecture)
        .from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        .eval()
    )


class _Sparse(nn.Module):
    """y = W s(x) + U V (x - s(x)) + c, each part of a fused linear by its own s."""

    def __init__(self, linear: nn.Linear, parts: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.linear, self.parts = linear, parts

    def forward(self, x: Tensor) -> Tensor:
        sizes = [part["rows"] for part in self.parts]
        outputs = []
        for part, weight in zip(
            self.parts, self.linear.weight.split(sizes), strict=True
        ):
            kept = x * (x.abs() > part["thresholds"])
            y = kept @ weight.T
            if "u" in part:
                y = y + (x - kept) @ (part["u"] @ part["v"]).T
            outputs.append(y + part.get("correction", 0))
        bias = 0 if self.linear.bias is None else self.linear.bias
        return torch.cat(outputs, -1) + bias


def _make_sparse(model: Any, prepared: Path) -> None:
    entries = json.loads((prepared / "rsparse/rsparse.json").read_text())["linears"]
    dense = ("in_proj_a", "in_proj_b", "shared_expert_gate", "router.proj")
    dense += ("per_layer_input_gate", "per_layer_projection")
    with safe_open(prepared / "rsparse/rsparse.safetensors", "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    for name, linear in list(model.get_decoder().layers.named_modules()):
        if not isinstance(linear, nn.Linear) or name.endswith(dense):
            continue
        parent, _, label = name.rpartition(".")
        parts = []
        for part_label in PARTS.get(label, (label,)):
            ending = f".layers.{parent}.{part_label}"
            (entry,) = [entry for entry in entries if entry.endswith(ending)]
            part = {
                key: tensors[f"{entry}.{key}"]
                for key in ("thresholds", "u", "v", "correction")
                if f"{entry}.{key}" in tensors
            }
            parts.append({**part, "rows": entries[entry]["shape"][0]})
        model.get_decoder().layers.set_submodule(name, _Sparse(linear, parts))
