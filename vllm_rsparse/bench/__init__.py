# SPDX-License-Identifier: Apache-2.0
"""``vllm-rsparse bench``: speed of the kernels on this device, and tuning for it.

layers -> inputs -> (timing) -> measure -> command; tuner searches configurations.
"""
