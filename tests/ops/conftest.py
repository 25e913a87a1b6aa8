# SPDX-License-Identifier: Apache-2.0
"""Where the test files of this folder find the module that they share."""

import sys
from pathlib import Path

# Importlib mode does not put it there: for triton_case.py, which test files import.
sys.path.insert(0, str(Path(__file__).parent))
