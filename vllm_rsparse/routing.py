# SPDX-License-Identifier: Apache-2.0
"""Up to how many tokens a call takes the sparse route, where the user does not say."""

from vllm_rsparse.ops import Backend

# Largest number of tokens for which the sparse route was not slower than the dense one
# in the model-shaped runs of benchmarks/README.md. Every token brings its own mask and
# the weights read are their union, so the gain fades quickly. Both are sizes for which
# vLLM captures a CUDA graph.
_DEFAULTS = {
    Backend.CPU: 1,
    Backend.CPU_TORCH: 1,
    Backend.TRITON: 2,
    # The definition is never fast; it covers what the kernels cover.
    Backend.REFERENCE: 16,
}


def default_max_sparse_tokens(backend: Backend) -> int:
    """The measured switch point of a backend."""
    return _DEFAULTS[backend]
