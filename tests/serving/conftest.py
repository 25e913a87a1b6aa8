# SPDX-License-Identifier: Apache-2.0
"""vLLM's layers without its engine, on simulated ranks."""

import sys

import pytest

# Of vLLM's model executor: those that ask for the rank.
MODULES = ("parameter", "layers.linear", "layers.vocab_parallel_embedding")


@pytest.fixture
def engine(monkeypatch):
    """Call with (rank, size): vLLM's layers then believe to be that rank."""
    from vllm.config import VllmConfig, set_current_vllm_config

    def become(rank, size):
        for module in MODULES:
            for name, value in (("rank", rank), ("world_size", size)):
                attribute = (
                    f"vllm.model_executor.{module}.get_tensor_model_parallel_{name}"
                )
                monkeypatch.setattr(attribute, lambda v=value: v)

    with set_current_vllm_config(VllmConfig()):
        yield become


@pytest.fixture
def layers_without_a_model(monkeypatch):
    """Not every linear of the artifact has a layer, which serving would refuse."""
    from vllm_rsparse.serving.served import ServedModel

    monkeypatch.setattr(ServedModel, "check_coverage", lambda self: None)


@pytest.fixture(scope="module")
def torchvision(torchvision_stand_in):
    """Something to import as torchvision: itself, or its stand-in."""
    if torchvision_stand_in is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(torchvision_stand_in)
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
