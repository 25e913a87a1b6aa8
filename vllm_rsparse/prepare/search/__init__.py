# SPDX-License-Identifier: Apache-2.0
"""How recipes allocate the sparsity of the model to its linears."""
