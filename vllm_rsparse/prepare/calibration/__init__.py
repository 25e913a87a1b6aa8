# SPDX-License-Identifier: Apache-2.0
"""From activations to thresholds, factors and constants."""
