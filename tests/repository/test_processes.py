# SPDX-License-Identifier: Apache-2.0
"""What `make test` gives to the same process: tests/processes.py in small projects."""

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("xdist")

ROOT = Path(__file__).resolve().parents[2]
TWO_TESTS = "def test_1(): pass\ndef test_2(): pass\n"
# As in the Makefile.
OPTIONS = ("--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder")


def run(
    folder: Path, files: dict[str, str], *options: str
) -> subprocess.CompletedProcess[str]:
    """pytest in a project of these test files."""
    for name, text in files.items():
        path = folder / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    shutil.copy(ROOT / "tests/processes.py", folder / "tests/conftest.py")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = serve\n")
    command = [sys.executable, "-m", "pytest", "-v", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_what_starts_vllm_is_one_group_and_a_file_another(tmp_path: Path) -> None:
    names = ("a/test_a.py", "distributed/test_d.py", "e2e/test_e.py", "e2e/test_f.py")
    printed = run(tmp_path, dict.fromkeys(names, TWO_TESTS), *OPTIONS).stdout
    processes = defaultdict(list)
    for process, name in re.findall(r"\[(gw\d)\].*PASSED tests/(.*)::", printed):
        processes[name].append(process)
    assert {name: len(ran) for name, ran in processes.items()} == dict.fromkeys(
        names, 2
    ), printed
    (others,) = set(processes.pop("a/test_a.py"))
    (serving,) = {process for ran in processes.values() for process in ran}
    assert others != serving


def test_a_test_elsewhere_is_not_marked_serve(tmp_path: Path) -> None:
    marked = "import pytest\npytestmark = pytest.mark.serve\ndef test_1(): pass\n"
    said = run(tmp_path, {"a/test_a.py": marked}).stderr
    assert "tests/a/test_a.py::test_1 is marked serve" in said
    assert run(tmp_path, {"a/test_a.py": marked}, *OPTIONS).returncode != 0


def test_the_makefile_has_these_options() -> None:
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"pytest (--numprocesses.*)", text)
    found = command.replace("$(TEST_PROCESSES)", "2").split()
    assert found == [*OPTIONS, "$(PYTEST_ARGS)"]
