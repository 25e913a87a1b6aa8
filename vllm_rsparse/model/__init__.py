# SPDX-License-Identifier: Apache-2.0
"""The base model on disk and in memory: structure, tensors, text. No vLLM."""
