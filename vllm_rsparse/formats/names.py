# SPDX-License-Identifier: Apache-2.0
"""Names of the formats, without torch: importing it takes seconds, --help has none.

A test compares them with ``registry``.
"""

# What kernels read.
SERVED_FORMATS = ("float", "fp8", "fp8-block", "int4", "int8-planes")
# What checkpoints have: those, and one that is served as another.
WEIGHT_FORMATS = (*SERVED_FORMATS, "int8")
# Weights are served as the checkpoint stores them, or quantized while they load.
AS_STORED = "as-stored"
LOAD_TIME_FORMATS = ("fp8", "int8-planes")
# Those that the output layer may have: no scales in the artifact.
HEAD_FORMATS = ("fp8", "int8-planes")
# The output layer's thresholds have one row, so that it is not sparse in these.
DENSE_HEAD_FORMATS = ("int8-planes",)
# Formats that no kernel reads, and what they are served as.
ONLY_AS = {"int8": "int8-planes"}
