# SPDX-License-Identifier: Apache-2.0
"""Up to how many tokens a call takes the sparse route, where the user does not say."""

from vllm_rsparse.op.ops import Backend

# Largest number of tokens for which the sparse route was faster than the dense one at
# 50% kept: on the H200 two (1.17x and 1.21x in two runs of vLLM), not four, whose masks
# together want 94% of the channels (kernels/README.md); on CPUs two (docs/cpu.md). Both
# are sizes for which vLLM captures a CUDA graph.
_DEFAULTS = {
    Backend.CPU: 2,
    Backend.CPU_TORCH: 1,
    Backend.TRITON: 2,
    # The definition is never fast; it covers what the kernels cover.
    Backend.REFERENCE: 16,
}
# The four linears of Llama-3-8B on the H200 at two tokens: 96.5 us where 75% of the
# channels are read, 8 of them whatever is read; cuBLAS takes 117.4. They meet at 92%.
_BREAK_EVEN = 0.9


def default_max_sparse_tokens(backend: Backend, read_fraction: float = 0.5) -> int:
    """The measured switch point of a backend.

    Every token brings its own mask, and the weights read are the masks' union, which
    on real text is nearly that of independent masks: 1 - (1 - f)^M. The default is the
    largest M, up to the backend's, for which that leaves enough unread.

    Args:
        backend: resolved.
        read_fraction: f, share of the linears' bytes that one token reads, in [0, 1].
    """
    limit = _DEFAULTS[backend]
    if backend is Backend.TRITON:
        while limit and 1 - (1 - read_fraction) ** limit > _BREAK_EVEN:
            limit -= 1
    return limit
