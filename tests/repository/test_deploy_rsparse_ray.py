# SPDX-License-Identifier: Apache-2.0
"""deploy/ray/rsparse-ray: what it calls, from where, and what it refuses."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FAKE = """#!/usr/bin/env bash
printf '%s' "${0##*/}" >>"$CALLS"
printf ' %q' "$@" >>"$CALLS"
printf ' | %s %s %s\\n' "$PWD" "${VLLM_HOST_IP:-}" "${RAY_ADDRESS:-}" >>"$CALLS"
[[ $1 != doctor || -z ${SICK:-} ]]
"""

Run = Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]


@pytest.fixture
def rsparse_ray(tmp_path: Path) -> Run:
    """Run the script with programs that only write down how they were called."""
    for name in ("ray", "vllm", "vllm-rsparse"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)

    def run(
        *arguments: str, path: str = f"{tmp_path}:/usr/bin:/bin", **env: str
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        done = subprocess.run(
            [ROOT / "deploy/ray/rsparse-ray", *arguments],
            env={"PATH": path, "CALLS": str(calls), **env},
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        return done, calls.read_text().splitlines()

    return run


def test_ray_head_and_join(rsparse_ray: Run) -> None:
    done, calls = rsparse_ray("head", "10.0.0.1", "--num-cpus=2", RAY_PORT="7000")
    assert done.returncode == 0
    assert calls[0].startswith("vllm-rsparse doctor")
    # From /, not from the checkout; the address is what vLLM's workers announce.
    assert calls[1] == (
        "ray start --node-ip-address=10.0.0.1 --head --port=7000"
        " --include-dashboard=false --num-cpus=2 | / 10.0.0.1 "
    )
    done, calls = rsparse_ray("join", "10.0.0.1", "10.0.0.2")
    assert calls[1] == (
        "ray start --node-ip-address=10.0.0.2 --address=10.0.0.1:6379 | / 10.0.0.2 "
    )


def test_ray_serve(rsparse_ray: Run) -> None:
    model = "tests/assets/pyllama-8m"
    _, calls = rsparse_ray("serve", "10.0.0.1", model, "--tensor-parallel-size", "2")
    assert calls == [
        f"vllm serve {ROOT / model} --quantization rsparse"
        " --distributed-executor-backend ray --tensor-parallel-size 2"
        " | / 10.0.0.1 10.0.0.1:6379"
    ]
    _, calls = rsparse_ray("serve", "10.0.0.1", "org/model")
    assert calls[0].startswith("vllm serve org/model --quantization rsparse")


def test_ray_refuses_a_machine_that_cannot_serve(rsparse_ray: Run) -> None:
    done, calls = rsparse_ray("head", "10.0.0.1", SICK="1")
    assert done.returncode == 1
    assert "cannot serve" in done.stderr
    assert [call.split()[0] for call in calls] == ["vllm-rsparse"]


@pytest.mark.parametrize("arguments", [[], ["start"], ["head"], ["join", "a"]])
def test_ray_usage(rsparse_ray: Run, arguments: list[str]) -> None:
    done, calls = rsparse_ray(*arguments)
    assert (done.returncode, calls) == (2, [])
    assert "rsparse-ray join  HEAD ADDRESS" in done.stderr


def test_ray_without_the_environment(rsparse_ray: Run) -> None:
    done, _ = rsparse_ray("head", "10.0.0.1", path="/usr/bin:/bin")
    assert done.returncode == 1
    assert "no 'vllm-rsparse' on PATH" in done.stderr
