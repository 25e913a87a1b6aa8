# SPDX-License-Identifier: Apache-2.0
"""vLLM's layers without its engine, on simulated ranks."""

import importlib.util
import sys

import pytest

TORCHVISION = (
    "torchvision",
    "torchvision/io",
    "torchvision/transforms",
    "torchvision/transforms/functional",
    "torchvision/transforms/v2",
    "torchvision/transforms/v2/functional",
)
# A module that has every name, each a class that has every attribute.
ANY_NAME = """
__version__ = "0.28.0"


class Anything(type):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything(name, (), {})
"""


@pytest.fixture
def engine(monkeypatch):
    """Call with (rank, size): vLLM's layers then believe to be that rank."""
    from vllm.config import VllmConfig, set_current_vllm_config

    def become(rank, size):
        for module in ("parameter", "layers.linear"):
            for name, value in (("rank", rank), ("world_size", size)):
                attribute = (
                    f"vllm.model_executor.{module}.get_tensor_model_parallel_{name}"
                )
                monkeypatch.setattr(attribute, lambda v=value: v)

    with set_current_vllm_config(VllmConfig()):
        yield become


@pytest.fixture(scope="module")
def torchvision(tmp_path_factory):
    """A stand-in where it is not installed, which is where PyTorch is a CPU build.

    vLLM's classes of models with vision import names from it, which they use to prepare
    images.
    """
    if importlib.util.find_spec("torchvision"):
        yield
        return
    root = tmp_path_factory.mktemp("torchvision")
    for module in TORCHVISION:
        folder = root / module
        folder.mkdir()
        (folder / "__init__.py").write_text(ANY_NAME)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        yield
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def inspected_here():
    """vLLM looks at a model's class in this process; a new one takes seconds each."""
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
        yield
