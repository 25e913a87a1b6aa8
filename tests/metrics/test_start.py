# SPDX-License-Identifier: Apache-2.0
"""Starting the exporter: once, not when it is off, and saying why it cannot."""

import os
from pathlib import Path
from typing import Any

import pytest

from vllm_rsparse import envs
from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.metrics import exporter


@pytest.fixture
def facts(write_artifact: Any, tmp_path: Path) -> exporter.Facts:
    write_artifact(tmp_path, {"layers.0.q_proj": (8, 16, 0, False)})
    return exporter.facts(Artifact(tmp_path).info, "cpu", 1)


def test_started_twice_registers_once(
    facts: exporter.Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    first, second = (exporter.start(50, facts) for _ in range(2))
    assert first == second
    assert first is not None
    assert first.directory.is_dir()


def test_off(facts: exporter.Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(envs.METRICS_INTERVAL, "0")
    assert exporter.start(envs.metrics_interval(), facts) is None
    monkeypatch.setenv(envs.METRICS_INTERVAL, "often")
    with pytest.raises(ValueError, match="0 turns metrics off"):
        envs.metrics_interval()


def test_what_cannot_be_exported_is_said(
    facts: exporter.Facts,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(os.environ, "PROMETHEUS_MULTIPROC_DIR", "/somewhere")
    assert exporter.start(50, facts) is None
    assert "not exported: with several API servers" in caplog.text
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR")
    monkeypatch.setattr(exporter, "_exporter", None)

    def full(**options: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    assert exporter.start(50, facts) is None
    assert "No space left on device" in caplog.text
