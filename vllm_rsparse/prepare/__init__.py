# SPDX-License-Identifier: Apache-2.0
"""From a Hugging Face checkpoint to a directory that ``vllm serve`` takes.

checkpoint and texts in -> streaming (one decoder layer at a time) -> observers ->
thresholds and factors, as the recipe says -> writer out. ``pipeline.prepare`` ties
them together, ``command`` is the command line.
"""
