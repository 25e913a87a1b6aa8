# SPDX-License-Identifier: Apache-2.0
"""How checkpoints store a linear's weight: one file per checkpoint format."""
