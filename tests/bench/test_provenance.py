# SPDX-License-Identifier: Apache-2.0
"""Facts that are stored with a measurement."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vllm_rsparse.bench import provenance


def test_commit_of_the_checkout(
    monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    if not (repository / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True
    ).stdout.strip()
    assert re.fullmatch(rf"{head}(-dirty)?", provenance.commit())
    assert provenance.provenance()["commit"] == provenance.commit()


def test_copy_names_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert provenance.commit() == "abc"


def test_wheel_inside_another_checkout_has_no_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    copy = tmp_path / "provenance.py"
    shutil.copy(provenance.__file__, copy)
    monkeypatch.setattr(provenance, "__file__", str(copy))
    assert provenance.commit() == "unknown"


def test_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() == "unknown"
