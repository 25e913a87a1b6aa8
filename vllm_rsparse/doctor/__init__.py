# SPDX-License-Identifier: Apache-2.0
"""``vllm-rsparse doctor``: whether this installation, and a model, can be served."""
