# SPDX-License-Identifier: Apache-2.0
"""What the model does to its logits is part of the loss that scores and trials use."""

import json
import shutil
import sysconfig
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from vllm_rsparse.artifact.schema import ArtifactInfo
from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.pipeline import prepare

SCALING = 16.0  # a power of two: scaling by it is exact
LAYERS = 2


def _prepare(model: Path, output: Path) -> tuple[ArtifactInfo, Artifact]:
    info = prepare(
        PrepareOptions(
            model=str(model),
            output=output,
            sparsity=0.5,
            calibration_data=(Path(sysconfig.get_path("stdlib")) / "argparse.py",),
            recipe="best",
            samples=2,
            tokens=128,
            device="cpu",
        )
    )
    return info, Artifact(output / "rsparse")


def _write(source: Path, target: Path, embedding: float, **changes: object) -> Path:
    """The reference model's first layers, with its embedding multiplied."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= embedding
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, **changes}
    (target / "config.json").write_text(json.dumps(config))
    for file in source.glob("tokenizer*"):
        shutil.copy(file, target)
    return target


def test_the_same_function_with_scaled_logits_is_prepared_alike(
    pyllama: Path, tmp_path: Path
) -> None:
    llama = _write(pyllama, tmp_path / "llama", 1.0)
    granite = _write(
        pyllama,
        tmp_path / "granite",
        SCALING,  # the head is tied to it
        architectures=["GraniteForCausalLM"],
        model_type="granite",
        embedding_multiplier=1 / SCALING,
        logits_scaling=SCALING,
        attention_multiplier=0.125,  # one over the root of the head's 64 channels
        residual_multiplier=1.0,
    )
    plain, artifact = _prepare(llama, tmp_path / "rs-llama")
    scaled, other = _prepare(granite, tmp_path / "rs-granite")
    method = plain.provenance["method"]
    assert scaled.provenance["method"]["trials"] == pytest.approx(method["trials"])
    assert scaled.provenance["method"]["correction"] == method["correction"]
    for name, entry in plain.linears.items():
        assert scaled.linears[name].sparsity == pytest.approx(entry.sparsity)
        mine, theirs = artifact.read(name), other.read(name)
        assert theirs.thresholds.tolist() == pytest.approx(mine.thresholds.tolist())
