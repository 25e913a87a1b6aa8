# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of the plug-in, on the /metrics page that vLLM serves.

The op runs in worker processes, under CUDA graphs without any Python code of ours,
while the API server serves /metrics. A worker therefore counts in a small file that
both map (``counters.py``; its layout: ``layout.py``), and the API server reads the file
when it is scraped (``exporter.py``). Nothing is sent, and nothing waits.
"""
