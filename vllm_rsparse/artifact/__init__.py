# SPDX-License-Identifier: Apache-2.0
"""What ``prepare`` writes and everything else reads: schema, tensors, locations."""
