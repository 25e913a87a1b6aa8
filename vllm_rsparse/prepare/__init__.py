# SPDX-License-Identifier: Apache-2.0
"""From a Hugging Face checkpoint to a directory that ``vllm serve`` takes.

``command`` is the command line, ``pipeline.prepare`` the whole way. Imports go down:

    pipeline
    search/       scores, and strategies to allocate the sparsity to the linears
    calibration/  from activations to thresholds, factors and constants
    run           what all of these work on
    store/        the output directory, and what an interrupted run resumes from
    recipe/       what the user asked for
"""
