# SPDX-License-Identifier: Apache-2.0
"""deploy/cpu/install.sh with a Python that only writes down what it is asked."""

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy/cpu/install.sh"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

# VERSION_OK is the exit status of the script's check of the version; TORCH says where
# torch is found: by pip's own `settings`, at the other `index`, or nowhere.
FAKE_PYTHON = """#!/usr/bin/env bash
printf '%q ' "$@" >>"$CALLS"; echo >>"$CALLS"
case "$*" in
    -c*) exit "$VERSION_OK" ;;
    -V) echo "Python 3.9.1" ;;
    "-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *--extra-index-url*torch==*) [[ $TORCH == index ]] ;;
    *torch==*) [[ $TORCH == settings ]] ;;
esac
"""

Install = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def install(tmp_path: Path) -> Install:
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def run(torch: str, version_ok: int = 0) -> subprocess.CompletedProcess[str]:
        env = {
            **os.environ,
            "PYTHON": str(python),
            "CALLS": str(tmp_path / "calls"),
            "TORCH": torch,
            "VERSION_OK": str(version_ok),
        }
        (tmp_path / "calls").write_text("")
        return subprocess.run(
            [SCRIPT, tmp_path / "venv"], env=env, capture_output=True, text=True
        )

    return run


def pip_calls(tmp_path: Path) -> list[list[str]]:
    calls = map(shlex.split, (tmp_path / "calls").read_text().splitlines())
    return [call for call in calls if call[:2] == ["-m", "pip"]]


def test_uses_pips_own_settings_first(install: Install, tmp_path: Path) -> None:
    result = install("settings")
    assert result.returncode == 0, result.stderr
    calls = pip_calls(tmp_path)
    assert not any("--extra-index-url" in call for call in calls)
    assert all("--no-deps" in call for call in calls)
    torch, locks, shim, package = calls
    assert torch[-1].startswith("torch==")
    assert torch[-1].endswith("+cpu")
    assert [Path(word).name for word in locks[-2:]] == [
        "requirements.lock",
        "requirements-dev.lock",
    ]
    assert shim[-1] == str(ROOT / "deploy/cpu/vllm-shim")
    assert package[-2:] == ["--editable", str(ROOT)]
    assert all("--no-build-isolation" in call for call in (shim, package))


def test_falls_back_to_pytorchs_index(install: Install, tmp_path: Path) -> None:
    result = install("index")
    assert result.returncode == 0, result.stderr
    with_index = [call for call in pip_calls(tmp_path) if TORCH_INDEX in call]
    assert len(with_index) == 1
    assert with_index[0][-1].startswith("torch==")


def test_says_what_to_set_when_there_is_no_torch(
    install: Install, tmp_path: Path
) -> None:
    result = install("nowhere")
    assert result.returncode != 0
    for word in (TORCH_INDEX, "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        assert word in result.stderr
    assert not (tmp_path / "venv/.installed").exists()
    assert install("settings").returncode == 0, "a later try must not be spoilt"


def test_does_nothing_when_up_to_date(install: Install, tmp_path: Path) -> None:
    assert install("settings").returncode == 0
    assert install("settings").returncode == 0
    assert not pip_calls(tmp_path)


def test_refuses_an_old_python(install: Install, tmp_path: Path) -> None:
    result = install("settings", version_ok=1)
    assert result.returncode != 0
    assert "3.11" in result.stderr
    assert "Python 3.9.1" in result.stderr
    assert not pip_calls(tmp_path)
