# SPDX-License-Identifier: Apache-2.0
"""A prepared directory as a whole: what opens it, and the link that leads nowhere."""

import shutil

import pytest
import torch

from vllm_rsparse.artifact.prepared import PreparedDirectory, open_artifact
from vllm_rsparse.cli import main
from vllm_rsparse.errors import ArtifactError, CheckpointError


def thresholds(name, n, k):
    return {"thresholds": torch.full((k,), 0.1)}


@pytest.fixture(params=[1, 2], ids=["version-1", "version-2"])
def directory(request, write_prepared):
    return write_prepared("prepared", thresholds, request.param)


@pytest.fixture
def movable(write_prepared, pyllama, tmp_path):
    """A prepared directory that links to a base of its own."""
    base = shutil.copytree(pyllama, tmp_path / "base")
    path = write_prepared("prepared", thresholds)
    for link in path.iterdir():
        if link.is_symlink():
            link.unlink()
            link.symlink_to(base / link.name)
    return path, base


def test_everything_at_once(directory, pyllama):
    prepared = PreparedDirectory.open(directory)
    assert prepared.config["num_hidden_layers"] == 4
    assert prepared.settings.artifact == "rsparse"
    assert len(prepared.artifact.info.linears) == 28
    assert prepared.checkpoint.weight_files[0].resolve().parent == pyllama
    assert prepared.same_base(prepared)


def test_artifact_of_either_directory(directory):
    for path in (directory, directory / "rsparse"):
        assert open_artifact(path).directory == directory / "rsparse"


def test_artifact_is_read_without_the_base(movable):
    path, base = movable
    shutil.rmtree(base)
    assert open_artifact(path).info.linears


@pytest.mark.parametrize("gone", ["model.safetensors", "tokenizer.json"])
def test_base_that_is_gone_is_one_message_everywhere(
    movable, held_out, capsys, gone, monkeypatch
):
    path, base = movable
    (base / gone).unlink()
    expected = (
        f"{path / gone}: is a link to {base / gone}, which is gone; the base model was"
        " moved or deleted: put it back, or prepare again with --copy-weights"
    )
    assert main(["evaluate", str(path), "--data", str(held_out)]) == 1
    assert expected in capsys.readouterr().err
    assert main(["doctor", str(path)]) == 1
    assert expected in capsys.readouterr().out
    config = pytest.importorskip("vllm_rsparse.serving.config").RSparseConfig
    made = config.from_config({"quant_method": "rsparse", "artifact": "rsparse"})
    with pytest.raises(CheckpointError) as error:
        made.maybe_update_config(str(path))
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "neither a prepared directory"),
        ("{", "config.json: not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "has no quantization_config; pass a directory"),
        ('{"quantization_config": "int4"}', "must be an object, got 'int4'"),
        ('{"quantization_config": null}', "must be an object, got None"),
        ('{"quantization_config": {"quant_method": "awq"}}', "'awq', not 'rsparse'"),
        ('{"quantization_config": {"quant_method": "rsparse"}}', "lacks quant_method"),
        ('{"a": ' * 100_000, "not valid JSON"),
    ],
)
def test_what_is_no_prepared_directory(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(tmp_path)


def test_an_artifact_alone_is_no_prepared_directory(write_artifact, tmp_path):
    write_artifact(tmp_path, {"model.layers.0.mlp.up_proj": (8, 16, 0, False)})
    with pytest.raises(ArtifactError, match="an artifact without its model; pass the"):
        PreparedDirectory.open(tmp_path)
