# SPDX-License-Identifier: Apache-2.0
"""``prepare`` from end to end: what it writes, runs that die, what it refuses."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from vllm_rsparse.artifact.schema import BaseWeights
from vllm_rsparse.artifact.tensors import Artifact, file_sha256
from vllm_rsparse.artifact.versions import read_info, write_info
from vllm_rsparse.errors import CheckpointError, DeviceError, PrepareError
from vllm_rsparse.prepare.calibration import layer as calibrate_layer
from vllm_rsparse.prepare.calibration import linear as calibrate
from vllm_rsparse.prepare.pipeline import prepare

from .runs import TEXT, options

SPARSITY, SAMPLES, TOKENS, SEED = 0.5, 3, 256, 7
TEXTS = (TEXT, TEXT.with_name("ast.py"))
_options = partial(
    options, calibration_data=TEXTS, samples=SAMPLES, tokens=TOKENS, seed=SEED
)


@pytest.fixture(scope="module")
def prepared(pyllama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "out"
    prepare(_options(pyllama, output))
    return output


def test_the_directory_is_a_servable_checkpoint(prepared: Path, pyllama: Path) -> None:
    assert sorted(path.name for path in prepared.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "rsparse",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((prepared / "config.json").read_text())
    digest = file_sha256(prepared / "rsparse" / "rsparse.safetensors")
    assert config.pop("quantization_config") == {
        "quant_method": "rsparse",
        "format_version": 2,
        "artifact": "rsparse",
        "artifact_sha256": digest,
        "sparsity": SPARSITY,
    }
    assert config == json.loads((pyllama / "config.json").read_text())
    Artifact(prepared / "rsparse").verify_digest(digest)


def test_rsparse_json_says_how_it_was_made(prepared: Path, pyllama: Path) -> None:
    text = (prepared / "rsparse" / "rsparse.json").read_text()
    info = read_info(text, "rsparse.json")
    assert write_info(info) == text
    assert (info.sparsity, info.dtype, info.format_version) == (SPARSITY, "bfloat16", 2)
    assert info.base == BaseWeights("float", "bfloat16")
    assert info.achieved_sparsity == pytest.approx(SPARSITY, abs=0.01)
    provenance = info.provenance
    assert provenance["base_model"] == str(pyllama)
    assert provenance["recipe"] == {"name": "uniform", "sparsity": 0.5, "rho": 0.95}
    calibration = provenance["calibration"]
    assert [source["file"] for source in calibration["files"]] == list(map(str, TEXTS))
    assert calibration["samples"] == SAMPLES
    assert calibration["tokens"] == TOKENS
    assert calibration["seed"] == SEED
    assert (calibration["device"], calibration["dtype"]) == ("cpu", "float32")
    assert provenance["svd"]["largest_residual"]["exact"] < 1e-3


def test_the_same_seed_gives_the_same_files_bit_for_bit(
    prepared: Path, pyllama: Path, tmp_path: Path
) -> None:
    prepare(_options(pyllama, tmp_path / "again"))
    for file in ("rsparse/rsparse.safetensors", "rsparse/rsparse.json", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (
            prepared / file
        ).read_bytes()


def test_another_seed_gives_other_thresholds(
    prepared: Path, pyllama: Path, tmp_path: Path
) -> None:
    prepare(_options(pyllama, tmp_path / "other", seed=SEED + 1))
    name = "model.layers.0.self_attn.q_proj"
    mine = Artifact(prepared / "rsparse").read(name)
    other = Artifact(tmp_path / "other" / "rsparse").read(name)
    assert not torch.equal(mine.thresholds, other.thresholds)


def test_rho_one_writes_no_factors(pyllama: Path, tmp_path: Path) -> None:
    info = prepare(_options(pyllama, tmp_path / "out", rho=1.0, copy_weights=True))
    with safe_open(tmp_path / "out/rsparse/rsparse.safetensors", "pt") as tensors:
        assert {key.rsplit(".", 1)[1] for key in tensors.keys()} == {"thresholds"}  # noqa: SIM118
    assert {entry.rank for entry in info.linears.values()} == {0}
    assert info.achieved_sparsity == pytest.approx(SPARSITY, abs=1e-4)
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()


def test_sparsity_zero_keeps_everything(pyllama: Path, tmp_path: Path) -> None:
    info = prepare(_options(pyllama, tmp_path / "out", sparsity=0.0, rho=1.0))
    for entry in info.linears.values():
        assert entry.kept_fraction == 1.0
        assert entry.relative_error == 0.0


def test_bfloat16_calibration_is_close_to_float32(
    prepared: Path, pyllama: Path, tmp_path: Path
) -> None:
    prepare(_options(pyllama, tmp_path / "out", dtype="bfloat16"))
    exact, rounded = (
        Artifact(path / "rsparse") for path in (prepared, tmp_path / "out")
    )
    for name in exact.info.linears:
        torch.testing.assert_close(
            rounded.read(name).thresholds,
            exact.read(name).thresholds,
            # A quantile moves by about the rounding of its activations, 2^-8, and by
            # the drift of four layers.
            rtol=0.03,
            atol=0,
        )


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [0, 11])
def test_a_run_that_dies_leaves_nothing(
    error: type[BaseException],
    after: int,
    pyllama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0

    def dying(*args: Any) -> calibrate.CalibratedLinear:
        nonlocal calls
        calls += 1
        if calls > after:
            raise error
        return calibrate.calibrate_linear(*args)

    monkeypatch.setattr(calibrate_layer, "calibrate_linear", dying)
    with pytest.raises(error):
        prepare(_options(pyllama, tmp_path / "out", samples=1))
    assert calls == after + 1
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_keeps_the_old_directory(
    pyllama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    prepare(_options(pyllama, output, samples=1, rho=1.0))
    before = file_sha256(output / "rsparse" / "rsparse.safetensors")

    def dying(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(calibrate_layer, "calibrate_linear", dying)
    with pytest.raises(OSError, match="No space left"):
        prepare(_options(pyllama, output, samples=1, seed=9, overwrite=True))
    monkeypatch.undo()
    assert file_sha256(output / "rsparse" / "rsparse.safetensors") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    prepare(_options(pyllama, output, samples=1, rho=1.0, seed=9, overwrite=True))
    assert file_sha256(output / "rsparse" / "rsparse.safetensors") != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_longer_windows_than_the_model(pyllama: Path, tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"--calibration-tokens 2049 .* 2048 \(max"):
        prepare(_options(pyllama, tmp_path / "out", tokens=2049))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(pyllama: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"--device cuda: .* use --device cpu"):
        prepare(_options(pyllama, tmp_path / "out", device="cuda"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, r"--sparsity must lie in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"--sparsity"),
        ({"sparsity": math.nan}, r"--sparsity"),
        ({"rho": 0.0}, r"--rho must lie in \(0, 1\], got 0.0"),
        ({"rho": 1.1}, r"--rho"),
        ({"samples": 0}, r"--calibration-samples must be at least 1"),
        ({"tokens": 0}, r"--calibration-tokens must be at least 1"),
        ({"seed": -1}, r"--seed must lie in"),
        ({"device": "tpu"}, r"--device must be one of auto, cpu, cuda, got 'tpu'"),
        ({"dtype": "int8"}, r"--dtype must be one of .*, got 'int8'"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PrepareError, match=message):
        _options(Path("model"), Path("out"), **changes)


def test_a_prepared_directory_is_no_base(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="written by `vllm-rsparse prepare`"):
        prepare(_options(prepared, tmp_path / "out"))


def test_biases_and_norms_of_qwen(
    tmp_path: Path, pyllama: Path, edit_json: Callable[..., None]
) -> None:
    """Another family through the whole pipeline, sharded, in float16."""
    config = transformers.Qwen2Config(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    base = tmp_path / "base"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(base, max_shard_size="100KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (base / file).write_bytes((pyllama / file).read_bytes())
    info = prepare(_options(base, tmp_path / "out", tokens=None, samples=2, rho=0.5))
    assert info.dtype == "float16"
    assert info.provenance["calibration"]["tokens"] == 128
    artifact = Artifact(tmp_path / "out" / "rsparse")
    artifact.verify_digest()
    assert artifact.info.linears["model.layers.1.self_attn.v_proj"].shape == (32, 64)
    linked = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(linked) > 2
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
