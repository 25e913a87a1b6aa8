# SPDX-License-Identifier: Apache-2.0
"""The error of everything that a user of ``prepare`` can put right."""


class PrepareError(ValueError):
    """Bad input to ``prepare``; the message names it and says what to do."""
