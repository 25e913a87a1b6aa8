# SPDX-License-Identifier: Apache-2.0
"""Activation-sparse decoding (R-Sparse, arXiv 2504.19449) as a vLLM plugin.

Importing this package imports neither torch nor vLLM: every vLLM process loads the
plug-in's entry point, most of them without needing it.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vllm-rsparse")
except PackageNotFoundError:  # a checkout on PYTHONPATH that was never installed
    __version__ = "0.0.0+uninstalled"
