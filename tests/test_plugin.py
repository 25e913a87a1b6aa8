# SPDX-License-Identifier: Apache-2.0
"""The entry point: found by vLLM, idempotent, light to import."""

import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

pytest.importorskip("vllm")

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.quantization import get_quantization_config

from vllm_rsparse import envs, releases
from vllm_rsparse.plugin import register
from vllm_rsparse.serving.config import RSparseConfig


def test_entry_point_is_installed():
    (entry,) = entry_points(group="vllm.general_plugins", name="rsparse")
    assert entry.load() is register


def test_register_twice_resolves_to_our_config():
    register()
    register()
    assert get_quantization_config("rsparse") is RSparseConfig


def test_vllm_knows_our_environment_variables():
    import vllm.envs

    register()
    ours = {
        value
        for name, value in vars(envs).items()
        if name.isupper() and str(value).startswith("VLLM_RSPARSE_")
    }
    assert len(ours) >= 3
    assert ours <= set(vllm.envs.environment_variables)


def test_importing_the_package_imports_neither_torch_nor_vllm():
    code = (
        "import sys, vllm_rsparse, vllm_rsparse.plugin;"
        "sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def broken(monkeypatch):
    """The plug-in registered in an environment where a module of ours cannot load."""
    monkeypatch.delitem(sys.modules, "vllm_rsparse.serving.config")
    # Python's own way to say that importing a module fails.
    monkeypatch.setitem(sys.modules, "vllm_rsparse.serving.served", None)
    register()
    yield get_quantization_config("rsparse")
    monkeypatch.undo()
    register()


def test_a_failed_import_is_the_reason_that_users_read(broken, pyllama, tmp_path):
    """And not vLLM's "Unknown quantization method"."""
    reason = r"cannot be loaded with vLLM .*vllm_rsparse\.serving\.served.*doctor"
    with pytest.raises(ValueError, match=reason):
        VllmConfig(model_config=ModelConfig(str(pyllama), quantization="rsparse"))
    config = json.loads((pyllama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "rsparse", "artifact": "rsparse"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=reason):
        ModelConfig(str(tmp_path), skip_tokenizer_init=True)


def test_a_failed_import_leaves_other_models_alone(broken, pyllama):
    assert ModelConfig(str(pyllama)).quantization is None
    assert broken.override_quantization_method({"quant_method": "fp8"}, None) is None


def test_a_release_of_vllm_that_is_not_supported_is_named(monkeypatch):
    from vllm_rsparse import plugin

    monkeypatch.setattr(releases, "installed", lambda name: "0.1.0")
    reason = plugin._reason(ImportError("no module"))
    assert "vLLM 0.1.0 (ImportError: no module); it supports vLLM " in reason
    assert "install one of these" in reason
