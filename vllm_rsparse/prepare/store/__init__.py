# SPDX-License-Identifier: Apache-2.0
"""What ``prepare`` writes: its output, and what lets an interrupted run resume."""
