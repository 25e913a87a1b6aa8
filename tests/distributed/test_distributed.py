# SPDX-License-Identifier: Apache-2.0
"""A cheap part of the scripts in this folder; docs/notes/distributed.md has it all."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("ray")

pytestmark = pytest.mark.serve

HERE = Path(__file__).parent


def run_script(name, *arguments):
    """The script's standard output; it makes its own namespaces and leaves nothing."""
    command = [sys.executable, HERE / name, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if result.returncode == 77:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stdout + result.stderr[-6000:]
    return result.stdout


def test_four_ranks_on_two_ray_nodes_give_the_tokens_of_one():
    """Tensor parallel inside a node, pipeline parallel between the two."""
    layouts = "mp1-tp1-pp1,ray2-tp2-pp2"
    table = run_script("tokens.py", "--only", layouts, "--prompts", 12)
    assert "| ray2-tp2-pp2 |" in table


def test_node_without_the_artifact_is_named_before_weights_load(tmp_path):
    run_script("faults.py", "--only", "artifact_missing", "--keep", tmp_path)
    (log,) = (path.read_text() for path in tmp_path.glob("server*.log"))
    assert "rsparse: the nodes of this server differ" in log
    assert "Loading weights took" not in log
