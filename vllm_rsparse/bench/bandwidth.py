# SPDX-License-Identifier: Apache-2.0
"""How fast the device reads memory, the reference for a kernel's bandwidth."""

import torch

from vllm_rsparse.bench.timing import time_calls

_BYTES = 2**31


def read_bandwidth(device: str) -> float:
    """Bytes per second of a read-only pass over 2 GiB.

    On a GPU a kernel that only reads, on a CPU torch's sum.

    Raises:
        RuntimeError: not every element was read.
    """
    source = torch.ones(_BYTES // 4, dtype=torch.float32, device=device)
    if device == "cpu":
        timing = time_calls([source.sum], replays=5)
    else:
        # Imported here, so that a CPU can be measured without Triton.
        from vllm_rsparse.bench.read_kernel import read_all

        sums = read_all(source)
        if sums.sum().item() != source.numel():
            raise RuntimeError("the read kernel did not read every element")
        calls = [lambda: read_all(source)]
        timing = time_calls(calls, calls_per_graph=1, replays=10)
    return _BYTES / (timing.median * 1e-6)
