# SPDX-License-Identifier: Apache-2.0
"""vLLM's own models, built and loaded for one simulated rank after another."""

from types import SimpleNamespace

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)
from vllm.model_executor.models.transformers.base import Base

from vllm_rsparse.serving.linear import RSparseLinearMethod


class FakeGroup(SimpleNamespace):
    """One rank of a group whose collectives leave the joining to the test."""

    @property
    def device_group(self):
        return SimpleNamespace(rank=lambda: 0, size=lambda: self.world_size)

    def all_reduce(self, x):
        return x

    @property
    def is_first_rank(self):
        return self.rank_in_group == 0

    @property
    def is_last_rank(self):
        return self.rank_in_group == self.world_size - 1


def build_model(patch, model_config, tensors, rank=0, size=1, stage=0, stages=1):
    """The model of a rank, with a checkpoint's tensors.

    Args:
        patch: a MonkeyPatch, which has to outlive the model.
        model_config: vLLM's.
        tensors: of the checkpoint by name.
        rank: of ``size`` tensor-parallel ones.
        size: how many there are.
        stage: of ``stages`` pipeline stages.
        stages: how many there are.
    """
    alone = FakeGroup(rank_in_group=0, world_size=1)
    for name, group in (
        ("_TP", FakeGroup(rank_in_group=rank, world_size=size)),
        ("_PP", FakeGroup(rank_in_group=stage, world_size=stages)),
        ("_EP", alone),
        ("_DP", alone),
        ("_PCP", alone),
        ("_WORLD", alone),
    ):
        patch.setattr(parallel_state, name, group)
    # Compilation would stay in transformers' classes, for all tests that follow.
    patch.setattr(Base, "_decorate_cls_for_torch_compile", lambda *_, **__: None)
    config = VllmConfig(model_config=model_config)
    config.parallel_config.pipeline_parallel_size = stages
    with set_current_vllm_config(config), torch.no_grad():
        model = initialize_model(vllm_config=config)
        model.load_weights(tensors.items())
        process_weights_after_loading(model, model_config, torch.device("cpu"))
    return model


def sparse_linears(model):
    """The layers that an artifact made sparse, by the engine's name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quant_method", None), RSparseLinearMethod)
    }


def output(layer, x):
    """A layer's output: half of a pair in vLLM's own models, else all it returns."""
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y
