# SPDX-License-Identifier: Apache-2.0
"""How quantized checkpoints store a linear, and what ``quantization_config`` means.

A *scheme* is a parsed ``quantization_config``: which linears are quantized, and in
which layout. A *layout* names the tensors of such a linear and turns them into a
``StoredWeight``. ``prepare`` and the engine's loaders use the same layouts.
"""
