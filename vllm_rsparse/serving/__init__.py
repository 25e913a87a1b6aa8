# SPDX-License-Identifier: Apache-2.0
"""The engine plug: vLLM's configuration and linear method for a prepared model."""
