# SPDX-License-Identifier: Apache-2.0
"""Plans of linears, and the recipes that decide on them."""
