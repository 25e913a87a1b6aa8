# SPDX-License-Identifier: Apache-2.0
"""vLLM's layers without its engine, on simulated ranks."""

import pytest


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
