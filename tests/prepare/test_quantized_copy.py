# SPDX-License-Identifier: Apache-2.0
"""``prepare --copy-weights --weights``: directories that hold what is served."""

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.errors import PrepareError, SettingError
from vllm_rsparse.evaluate.loading import SwitchableModel
from vllm_rsparse.formats.checkpoints.on_disk import on_disk_layout
from vllm_rsparse.formats.registry import load_time_format
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.language_model import LanguageModel
from vllm_rsparse.model.linears import find_linears
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.pipeline import prepare
from vllm_rsparse.prepare.store import output as output_module
from vllm_rsparse.prepare.store.quantized_copy import QuantizedCopy
from vllm_rsparse.testing.families import FAMILIES
from vllm_rsparse.testing.quantized import write_quantized

TEXTS = (Path(sysconfig.get_path("stdlib")) / "argparse.py",)
FORMATS = ("int8-planes", "fp8")
SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def _options(model: Path, output: Path, weights: str, **changes: Any) -> PrepareOptions:
    planes = weights == "int8-planes"
    settings: dict[str, Any] = {
        "model": str(model),
        "output": output,
        "sparsity": None if planes else 0.5,
        "bits": 4.2 if planes else None,
        "weights": weights,
        "calibration_data": TEXTS,
        "recipe": "uniform" if weights == "fp8" else "wina",
        "rho": 1.0,
        "samples": 2,
        "tokens": 64,
        "device": "cpu",
    }
    return PrepareOptions(**(settings | changes))


def _in_shards(source: Path, target: Path) -> Path:
    """A copy of a checkpoint in two files, with an index."""
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    target.mkdir()
    for file in source.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    weight_map = {}
    for number in (0, 1):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        part = {name: tensors[name] for name in names[number::2]}
        save_file(part, target / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def _tensors(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: t for file in files for name, t in load_file(file).items()}


@pytest.mark.parametrize("weights", FORMATS)
def test_the_directory_holds_what_loading_would_make(
    weights: str, tiny_llama: Path, tmp_path: Path
) -> None:
    base = _in_shards(tiny_llama, tmp_path / "base")
    linked, copied = tmp_path / "linked", tmp_path / "copied"
    prepare(_options(base, linked, weights))
    prepare(_options(base, copied, weights, copy_weights=True))
    plain, written = _tensors(base), _tensors(copied)
    load_time = load_time_format(weights)
    assert load_time is not None
    linears = {n for n in plain if n.endswith("_proj.weight")}
    assert len(linears) == 28
    # Nothing of the base's linears is there; everything else is, bit for bit.
    for name in plain.keys() - linears:
        assert torch.equal(written[name], plain[name])
    for name in linears:
        assert written.get(name) is None or written[name].itemsize == 1
        stored = load_time.encode(plain[name])
        module = name.removesuffix(".weight")
        read = Checkpoint(copied).read_linear(module)
        assert torch.equal(read.data, stored.data)
        assert read.scales is not None
        assert stored.scales is not None
        assert torch.equal(read.scales, stored.scales)
        if stored.zeros is not None:
            assert read.zeros is not None
            assert torch.equal(read.zeros, stored.zeros)
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == written.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())
    size = sum(plain[name].nbytes for name in linears)
    kept = sum(plain[name].nbytes for name in plain.keys() - linears)
    assert index["metadata"]["total_size"] - kept < 0.55 * size
    # What is calibrated does not depend on it, and what is served neither.
    for name in ("rsparse.json", "rsparse.safetensors"):
        assert (linked / "rsparse" / name).read_bytes() == (
            copied / "rsparse" / name
        ).read_bytes()
    first, second = (PreparedDirectory.open(path) for path in (linked, copied))
    assert second.settings.weights_on_disk == weights
    windows = torch.randint(0, 4096, (2, 32))
    logits = []
    for one in (first, second):
        model = SwitchableModel(one.checkpoint, torch.device("cpu"), torch.float32)
        model.use(one.artifact)
        logits.append(model.logits(windows, 4, sparse=True))
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", ["Phi3", "Gemma3 vision", "Qwen3 MoE"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Fused linears stay one tensor; a vision tower and experts stay as they are."""
    base, copied = tmp_path / "base", tmp_path / "copied"
    plain = FAMILIES[family].save(base, SIZES)
    checkpoint = Checkpoint(base)
    linears, _ = find_linears(checkpoint)
    load_time = load_time_format("int8-planes")
    assert load_time is not None
    copied.mkdir()
    copy = QuantizedCopy(checkpoint, linears, load_time, torch.device("cpu"))
    copy.write(copied)
    config = json.loads((base / "config.json").read_text())
    ours = {"quant_method": "rsparse", "weights_on_disk": "int8-planes"}
    (copied / "config.json").write_text(
        json.dumps(config | {"quantization_config": ours})
    )
    written = Checkpoint(copied)
    model = LanguageModel(checkpoint, load_time)
    served = LanguageModel(written)
    for linear in linears:
        expected = model.read_stored(linear.name)
        found = served.read_stored(linear.name)
        assert torch.equal(found.data, expected.data)
        assert torch.equal(found.dequantise(), expected.dequantise())
    for name in plain:
        if name not in written.tensors:
            assert f"{name}_planes" in written.tensors
    assert set(written.plain_names()) == set(plain)


@pytest.mark.parametrize("layout", ["fp8-block", "w8a16-g128", "int8-channel"])
def test_a_quantized_base(layout: str, tiny_llama: Path, tmp_path: Path) -> None:
    base, copied = tmp_path / "base", tmp_path / "copied"
    meant = write_quantized(tiny_llama, base, layout)
    prepare(_options(base, copied, "int8-planes", copy_weights=True))
    opened = PreparedDirectory.open(copied)
    assert opened.settings.base is not None
    name = "model.layers.1.mlp.down_proj"
    load_time = load_time_format("int8-planes")
    expected = LanguageModel(Checkpoint(base), load_time).read_stored(name)
    assert torch.equal(opened.checkpoint.read_linear(name).data, expected.data)
    suffixes = {n.rpartition(".")[2] for n in opened.checkpoint.tensors}
    assert suffixes == {*on_disk_layout("int8-planes").required, "weight"}
    left = [n for n in opened.checkpoint.tensors if n.endswith("_proj.weight")]
    assert not left
    near = expected.dequantise() - meant[f"{name}.weight"]
    assert near.norm() < 0.02 * meant[f"{name}.weight"].norm()
    assert opened.artifact.info.base.format == layout_format(layout)


def layout_format(layout: str) -> str:
    return layout if layout.startswith("fp8") else "int8"


def test_int8_is_served_in_planes_only(tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_quantized(tiny_llama, base, "int8-channel")
    with pytest.raises(PrepareError, match=r"is stored in int8.*--weights int8-planes"):
        prepare(_options(base, tmp_path / "out", "as-stored"))
    with pytest.raises(SettingError, match="has int8; use --weights int8-planes"):
        prepare(_options(base, tmp_path / "out", "fp8"))


def test_the_room_is_that_of_what_is_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (tiny_llama / "model.safetensors").stat().st_size

    def free(share: float) -> Callable[[Path], Any]:
        class Usage:
            free = int(share * size)

        return lambda path: Usage

    # 1 MB of the 2.5 MB is the embedding, which stays.
    monkeypatch.setattr(output_module.shutil, "disk_usage", free(0.5))
    with pytest.raises(PrepareError, match="--copy-weights needs"):
        prepare(_options(tiny_llama, tmp_path / "out", "fp8", copy_weights=True))
    monkeypatch.setattr(output_module.shutil, "disk_usage", free(0.9))
    prepare(_options(tiny_llama, tmp_path / "out", "fp8", copy_weights=True))
