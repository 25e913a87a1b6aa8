# SPDX-License-Identifier: Apache-2.0
"""The op ``vllm_rsparse::linear``: definition, operands, backends. No vLLM."""
