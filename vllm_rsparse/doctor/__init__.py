# SPDX-License-Identifier: Apache-2.0
"""``vllm-rsparse doctor``: whether this installation, and a model, can be served."""

from vllm_rsparse.doctor.command import add_arguments, run

__all__ = ["add_arguments", "run"]
