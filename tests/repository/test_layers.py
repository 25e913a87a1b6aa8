# SPDX-License-Identifier: Apache-2.0
"""What import-linter does not see: ``kernels/`` has no ``__init__.py``."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Lower layers that the kernels may use, and the libraries of device code.
ALLOWED = ("torch", "triton", "vllm_rsparse.formats", "vllm_rsparse.errors")
STANDARD = ("functools", "dataclasses", "collections", "typing", "math")


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("kernels/*.py")), ids=lambda file: file.name
)
def test_kernels_import_nothing_above_them(file: Path) -> None:
    """No vLLM, no owner of a launch: the op passes the launch configuration down."""
    outside = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            outside += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.append(str(node.module))
    for name in outside:
        assert name.startswith((*ALLOWED, *STANDARD)), f"{file.name} imports {name}"
