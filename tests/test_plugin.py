# SPDX-License-Identifier: Apache-2.0
"""The entry point: found by vLLM, idempotent, light to import."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

pytest.importorskip("vllm")

from vllm_rsparse.plugin import register
from vllm_rsparse.serving.config import RSparseConfig


def test_entry_point_is_installed():
    (entry,) = entry_points(group="vllm.general_plugins", name="rsparse")
    assert entry.load() is register


def test_register_twice_resolves_to_our_config():
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    register()
    assert get_quantization_config("rsparse") is RSparseConfig


def test_vllm_knows_our_environment_variables():
    import vllm.envs

    register()
    assert "VLLM_RSPARSE_BACKEND" in vllm.envs.environment_variables
    assert "VLLM_RSPARSE_MAX_SPARSE_TOKENS" in vllm.envs.environment_variables


def test_importing_the_package_imports_neither_torch_nor_vllm():
    code = (
        "import sys, vllm_rsparse, vllm_rsparse.plugin;"
        "sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_other_checkpoints_are_not_claimed():
    # Called by vLLM for every quantized model that anybody serves.
    for user in (None, "rsparse"):
        config = {"quant_method": "fp8"}
        assert RSparseConfig.override_quantization_method(config, user) is None
