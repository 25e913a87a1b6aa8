# SPDX-License-Identifier: Apache-2.0
"""Where an artifact is: inside the model directory, at a path, or on the Hub."""

import json
from pathlib import Path

from vllm_rsparse.artifact.tensors import ARTIFACT_DIR, JSON_NAME, TENSORS_NAME
from vllm_rsparse.errors import ArtifactError

PARAMETER = "quantization_config.artifact"


def locate_artifact(
    source: str,
    model: str,
    revision: str | None = None,
    parameter: str = PARAMETER,
) -> Path:
    """Resolve the artifact that a model's config names to a local directory.

    Args:
        source: a path inside the model directory (or repository), an absolute path, or
            the name of a Hub repository with an artifact.
        model: the served model, a local directory or a Hub repository.
        revision: revision of the model's repository.
        parameter: what users call the setting, for messages.

    Returns:
        A directory with ``rsparse.json`` and ``rsparse.safetensors``.

    Raises:
        ArtifactError: a relative path leaves the model directory, or nothing is there.
    """
    path = _expanded(source)
    if path.is_absolute():
        if _named_by_repository(source, model, revision):
            raise ArtifactError(
                f"the config.json of the Hub repository {model!r} names the artifact"
                f" {source!r}, an absolute path of this machine; a repository may name"
                " a path inside it or another repository. If you want that path, name"
                " it yourself with --hf-overrides"
            )
        return _first_with_json([path, path / ARTIFACT_DIR], source, parameter)
    if ".." in path.parts:
        raise ArtifactError(
            f"{parameter} is {source!r}, which leaves the model directory; name a path"
            " inside it, or an absolute path"
        )
    root = Path(model)
    if root.is_dir():
        inside = root / path
        # No repository's name starts with a dot.
        hub = source.count("/") == 1 and not source.startswith((".", "~"))
        if _is_file(inside / JSON_NAME) or not hub:
            return _first_with_json([inside], f"{source!r} in {model}", parameter)
        return _download(source, None, ["", ARTIFACT_DIR], parameter)
    if source.count("/") == 1 and source != model:
        return _download(source, None, ["", ARTIFACT_DIR], parameter)
    return _download(model, revision, [source], parameter)


def _expanded(source: str) -> Path:
    """A path with the home directory for ``~``; unchanged if there is none."""
    try:
        return Path(source).expanduser()
    except RuntimeError:  # no home directory
        return Path(source)


def holds_artifact(directory: Path) -> bool:
    """Whether a directory is an artifact itself."""
    return _is_file(directory / JSON_NAME)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or contains a zero byte
        return False


def _named_by_repository(source: str, model: str, revision: str | None) -> bool:
    """Whether the Hub repository's own config, and not the user, names the artifact."""
    if Path(model).is_dir():
        return False
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        # The engine reads this file before it requests the artifact.
        config = try_to_load_from_cache(model, "config.json", revision=revision)
        if not isinstance(config, str):
            return False
        raw = json.loads(Path(config).read_text(encoding="utf-8"))
        settings = [raw.get(key) or {} for key in ("quantization_config", "rsparse")]
        return any(one.get("artifact") == source for one in settings)
    except (OSError, ValueError, AttributeError, HFValidationError):
        return False


def _first_with_json(candidates: list[Path], what: str, parameter: str) -> Path:
    for candidate in candidates:
        if _is_file(candidate / JSON_NAME):
            return candidate
    raise ArtifactError(
        f"no artifact at {what}: {candidates[0] / JSON_NAME} does not exist; write one"
        f" with `vllm-rsparse prepare`, or correct {parameter}"
    )


def _download(
    repo: str, revision: str | None, folders: list[str], parameter: str
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    files = [JSON_NAME, TENSORS_NAME]
    patterns = [f"{folder}/{f}".lstrip("/") for folder in folders for f in files]
    try:
        root = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ArtifactError(
            f"{parameter}: cannot fetch {' or '.join(patterns)} from"
            f" the Hub repository {repo!r} ({error}); use a local path, or make sure"
            " that the repository exists and can be reached from this node"
        ) from error
    candidates = [root / folder for folder in folders]
    return _first_with_json(candidates, f"{repo!r} (Hub)", parameter)
