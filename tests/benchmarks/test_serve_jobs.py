# SPDX-License-Identifier: Apache-2.0
"""Engines of ``bench_serve.py`` as processes, with a worker that only prints."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

WORKER = """
import json, os, sys
job = json.loads(sys.argv[1])
print("INFO Using MacheteLinearKernel for CompressedTensorsWNA16")
print("INFO Model loading took 5.32 GiB memory and 4.1 seconds")
print(json.dumps({"runs": {}, "limit": os.environ.get("VLLM_RSPARSE_LIMIT")}))
sys.exit(job["status"])
"""


@pytest.fixture
def jobs(
    import_script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> ModuleType:
    serve_jobs = import_script("serve_jobs")
    (tmp_path / "serve_worker.py").write_text(WORKER)
    monkeypatch.setattr(serve_jobs, "HERE", tmp_path)
    return serve_jobs


def test_a_row_has_what_vllm_logged(jobs, tmp_path: Path) -> None:
    settings = {"limit": 2, "other": None}
    job = jobs.EngineJob("a", {"status": 0}, tmp_path / "log", settings)
    assert job.run() == {
        "runs": {},
        "limit": "2",
        "vllm_kernels": ["MacheteLinearKernel"],
        "model_gib": 5.32,
    }


def test_a_failure_shows_the_end_of_its_log(jobs, tmp_path: Path) -> None:
    job = jobs.EngineJob("a", {"status": 3}, tmp_path / "log")
    with pytest.raises(RuntimeError, match=r"(?s)the end of .*log:.*Machete"):
        job.run()


@pytest.mark.parametrize("together", [False, True])
def test_results_keep_the_order_of_the_jobs(jobs, tmp_path: Path, together) -> None:
    many = [
        jobs.EngineJob(name, {"status": 0}, tmp_path / name, {"limit": name})
        for name in "abc"
    ]
    found = [(job.label, row["limit"]) for job, row in jobs.run_jobs(many, together)]
    assert found == [("a", "a"), ("b", "b"), ("c", "c")]


@pytest.mark.parametrize("together", [False, True])
def test_a_failure_ends_a_sequence_and_not_the_others(jobs, tmp_path, together) -> None:
    many = [
        jobs.EngineJob(name, {"status": name == "b"}, tmp_path / name) for name in "abc"
    ]
    results = jobs.run_jobs(many, together)
    found = [next(results)[0].label for _ in range(2 if together else 1)]
    if not together:
        assert not (tmp_path / "b").exists()  # an engine starts when it is asked for
    assert found == (["a", "c"] if together else ["a"])
    with pytest.raises(RuntimeError, match="the end of"):
        next(results)
    assert (tmp_path / "c").exists() == together
