# SPDX-License-Identifier: Apache-2.0
"""The engines of ``bench_serve.py`` and ``drafters.py``: processes of a worker."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class EngineJob:
    """One engine to run.

    Attributes:
        label: for its rows; ``{s}`` stands for the sparsity.
        job: what the worker does.
        log: file that gets the process's output.
        settings: of the plug-in, by the end of their environment variable's name; None
            leaves one at its default.
        script: the worker, next to this file.
    """

    label: str
    job: dict[str, Any]
    log: Path
    settings: dict[str, Any] = field(default_factory=dict)
    script: str = "serve_worker.py"

    def run(self) -> dict[str, Any]:
        """The worker's result, and what vLLM logged about kernels and memory.

        Raises:
            RuntimeError: the process failed; the message has the end of its log.
        """
        command = [sys.executable, str(HERE / self.script), json.dumps(self.job)]
        env = dict(os.environ)
        for name, value in self.settings.items():
            if value is not None:
                env[f"VLLM_RSPARSE_{name.upper()}"] = str(value)
        with self.log.open("w") as out:
            done = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, env=env
            )
        text = self.log.read_text()
        results = [line for line in text.splitlines() if line.startswith("{")]
        if done.returncode != 0 or not results:
            raise RuntimeError(
                f"{' '.join(command)}\nfailed; the end of {self.log}:\n{text[-3000:]}"
            )
        return {**json.loads(results[-1]), **_logged(text)}


def run_jobs(
    jobs: Sequence[EngineJob], together: bool
) -> Iterator[tuple[EngineJob, dict[str, Any]]]:
    """Run engines in the given order, or all at once; yields job and result.

    Raises:
        RuntimeError: one failed. In order, no further engine starts; all at once, it
            is raised after the results of the others.
    """
    if not together:
        for job in jobs:
            yield job, job.run()
        return
    failed = []
    with ThreadPoolExecutor(max(1, len(jobs))) as pool:
        for job, result in [(job, pool.submit(job.run)) for job in jobs]:
            if error := result.exception():
                failed.append(error)
            else:
                yield job, result.result()
    if failed:
        raise failed[0]


def _logged(text: str) -> dict[str, Any]:
    """The linear kernels that vLLM chose and the memory of the loaded model."""
    facts: dict[str, Any] = {}
    kernels = sorted(set(re.findall(r"(?:Using|Selected) (\w*Linear\w*) for", text)))
    if kernels:
        facts["vllm_kernels"] = kernels
    if memory := re.search(r"Model loading took ([\d.]+) ?GiB", text):
        facts["model_gib"] = float(memory[1])
    return facts
