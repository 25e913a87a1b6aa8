# SPDX-License-Identifier: Apache-2.0
"""How a weight is stored for the op: one file per format, torch only."""
