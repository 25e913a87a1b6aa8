# SPDX-License-Identifier: Apache-2.0
"""The linear method of layers that stay as the base model has them."""

from vllm.model_executor.layers.linear import (
    LinearBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from vllm_rsparse.serving.served import ServedModel


@register_weight_loader_v2_supported_method
class DenseLinearMethod(UnquantizedLinearMethod):
    """vLLM's own method, which also has the artifact checked against the model.

    A model whose every layer is dense has no sparse method that could notice: its
    names are not those of the artifact, and it would be served dense without a word.

    Args:
        served: what is served.
    """

    def __init__(self, served: ServedModel) -> None:
        super().__init__()
        self._served = served

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check first: the model is built now, whatever its layers are."""
        self._served.check_coverage()
        super().process_weights_after_loading(layer)
