# SPDX-License-Identifier: Apache-2.0
"""What a linear can get, and how a recipe says so."""
