# SPDX-License-Identifier: Apache-2.0
"""Compiling kernels for Hopper without a GPU.

The interpreter runs Python, which accepts what the compiler does not. A child process
calls the launchers on tensors of the host with a driver that knows an H100 and runs
nothing. Compilations are watched, as vLLM does once it is warm: Triton then writes the
constants of a kernel as JSON, and fails if it cannot. This process may have Triton in
interpreter mode, which is decided at import.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

BEFORE = """
import json, sys
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from vllm_rsparse.kernels import byte_linear, columns_linear, packed_linear
from vllm_rsparse.kernels import quantized_linear, rounded_blocks, rounded_linear
from vllm_rsparse.kernels import rsparse_linear, wide_linear

class Hopper:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

run = JITFunction.run
watched = set()

def compile_only(kernel, *args, **options):
    options["warmup"] = True
    made[kernel.__name__] = run(kernel, *args, **options).asm["ptx"]

driver.set_active(Hopper())
knobs.runtime.jit_post_compile_hook = lambda **made: watched.add(made["fn"].name)
JITFunction.run = compile_only
modules = packed_linear, quantized_linear, rsparse_linear, wide_linear, columns_linear
modules += byte_linear, rounded_blocks, rounded_linear
for module in modules:
    module.has_dependent_launch = lambda device: True
"""
AFTER = """
for case in json.loads(sys.argv[1]):
    made = {}
    call(case)
    assert watched.issuperset(made), (watched, list(made))
    print(json.dumps(made), flush=True)
"""


def compile_all(call: str, cases: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """PTX of the launches of each case, by the kernel's name.

    Args:
        call: code that defines ``call(case)``, which calls launchers.
        cases: JSON objects, what ``call`` gets.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + call + AFTER, json.dumps(list(cases))],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    made = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
    failed = cases[len(made) : len(made) + 1]
    assert done.returncode == 0, f"{failed}: {done.stderr[-3000:]}"
    return made
