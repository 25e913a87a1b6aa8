# SPDX-License-Identifier: Apache-2.0
"""Where an artifact may be, and that no config reaches outside the model directory."""

import json

import pytest

from vllm_rsparse.artifact import locate
from vllm_rsparse.artifact.locate import locate_artifact
from vllm_rsparse.errors import ArtifactError


@pytest.fixture
def model_dir(tmp_path):
    for folder in ("model/rsparse", "elsewhere", "elsewhere-prepared/rsparse"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "rsparse.json").touch()
    return tmp_path / "model"


def test_inside_the_model_directory(model_dir):
    assert locate_artifact("rsparse", str(model_dir)) == model_dir / "rsparse"


def test_absolute_artifact_or_prepared_directory(model_dir, tmp_path):
    artifact = tmp_path / "elsewhere"
    assert locate_artifact(str(artifact), str(model_dir)) == artifact
    prepared = tmp_path / "elsewhere-prepared"
    assert locate_artifact(str(prepared), str(model_dir)) == prepared / "rsparse"


@pytest.mark.parametrize("source", ["../elsewhere", "rsparse/../../elsewhere"])
def test_relative_path_may_not_leave(model_dir, source):
    with pytest.raises(ArtifactError, match="leaves the model directory"):
        locate_artifact(source, str(model_dir))


@pytest.mark.parametrize("source", ["nothing", "a/b/c", "/nowhere/at/all"])
def test_nothing_there(model_dir, source):
    with pytest.raises(ArtifactError, match="vllm-rsparse prepare"):
        locate_artifact(source, str(model_dir))


@pytest.mark.parametrize(
    ("source", "model", "repo", "revision"),
    [
        ("rsparse", "org/model-rs50", "org/model-rs50", "v2"),
        ("org/artifact", "org/model", "org/artifact", None),
        ("org/artifact", None, "org/artifact", None),
    ],
)
def test_hub_repositories(monkeypatch, tmp_path, source, model, repo, revision):
    calls = []
    if model is None:
        model = str(tmp_path / "local")
        (tmp_path / "local").mkdir()

    def snapshot_download(name, revision=None, allow_patterns=None):
        calls.append((name, revision, allow_patterns))
        (tmp_path / "rsparse").mkdir()
        (tmp_path / "rsparse" / "rsparse.json").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert locate.locate_artifact(source, model, "v2") == tmp_path / "rsparse"
    ((name, asked, patterns),) = calls
    assert (name, asked) == (repo, revision)
    assert "rsparse/rsparse.safetensors" in patterns
    assert not any("model" in p or p == "*" for p in patterns)


@pytest.mark.parametrize("key", ["quantization_config", "rsparse"])
def test_repository_may_not_name_a_path_of_this_machine(
    monkeypatch, tmp_path, model_dir, key
):
    artifact = str(tmp_path / "elsewhere")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({key: {"artifact": artifact}}))
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda *a, **k: str(config)
    )
    with pytest.raises(ArtifactError, match="--hf-overrides"):
        locate_artifact(artifact, "org/model")
    # The user names it for a repository whose config does not, or owns the directory.
    config.write_text("{}")
    assert locate_artifact(artifact, "org/model") == tmp_path / "elsewhere"
    assert locate_artifact(artifact, str(model_dir)) == tmp_path / "elsewhere"


def test_hub_failure_says_what_to_do(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ArtifactError, match=r"org/artifact.*no network.*local path"):
        locate_artifact("org/artifact", str(tmp_path))


@pytest.mark.parametrize("source", ["./nosuch", "~/nosuch", ".hidden/x"])
def test_paths_are_not_taken_for_repositories(model_dir, source, monkeypatch):
    monkeypatch.setenv("HOME", str(model_dir))
    with pytest.raises(ArtifactError, match=r"no artifact at .*does not exist"):
        locate_artifact(source, str(model_dir))


def test_a_path_below_the_home_directory(model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(model_dir))
    assert locate_artifact("~/rsparse", str(tmp_path)) == model_dir / "rsparse"
