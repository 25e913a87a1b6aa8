# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of the plug-in, on the /metrics page that vLLM serves.

The op runs in worker processes, under CUDA graphs without any Python of ours, while
/metrics is a page of the API server. So a worker counts in a small file that both map
(``counters.py``; its layout: ``layout.py``), and the API server reads it when it is
scraped (``exporter.py``). Nothing is sent, nothing waits.
"""
