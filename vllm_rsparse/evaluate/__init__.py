# SPDX-License-Identifier: Apache-2.0
"""``vllm-rsparse evaluate``: what a prepared model loses against its dense base.

directory -> loading (model with switchable linears) -> measure (one pass over held-out
windows, dense and every sparse variant on the same tokens) -> report (table, JSON).
With ``--engine vllm``, engine replaces measure: vLLM and the kernels do the arithmetic.
"""
