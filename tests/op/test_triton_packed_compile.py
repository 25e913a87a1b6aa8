# SPDX-License-Identifier: Apache-2.0
"""The kernels for int4 and fp8 weights compile for Hopper to what they are meant to be.

The packed kernel's steps rename registers. Where a compiler lays tensors out otherwise,
results stay right and every word takes a detour: hence the counts. In a child process,
through the launchers, like ``test_triton_compile.py``.
"""

import json
import os
import re
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
CHILD = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from vllm_rsparse.formats.checkpoints.parse import parse_scheme
from vllm_rsparse.formats.int8_planes import encode_planes
from vllm_rsparse.kernels import quantized_linear, rsparse_linear
from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.op import triton_backend
from vllm_rsparse.testing.cases import make_case
from vllm_rsparse.testing.quantized import LAYOUTS

class Hopper:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

run = JITFunction.run

def compile_only(kernel, *args, **options):
    options["warmup"] = True
    made[kernel.__name__] = run(kernel, *args, **options).asm["ptx"]

driver.set_active(Hopper())
JITFunction.run = compile_only
for module in (quantized_linear, rsparse_linear):
    module.has_dependent_launch = lambda device: True

def store(weight):
    if case["weight"] == "int8-planes":
        return encode_planes(weight, 64, weight.dtype)
    config, quantise = LAYOUTS[case["weight"]]
    layout = parse_scheme(config, "config").layout("linear")
    return layout.store(quantise(weight.float())[0])

for case in json.loads(sys.argv[1]):
    sizes, ranks = (512,), (0,)
    if not case["even"]:
        sizes, ranks = (256, 128, 128 + 16), (48, 0, 8)
    dtype = getattr(torch, case["dtype"])
    call = make_case(case["tokens"], 512, sizes, ranks, dtype, store=store)
    columns = 32 * quantized_linear.codes_per_word(call.operands.weight)
    packed = LaunchConfig(columns, 64, 2, 1, 1, False, packed=True)
    made = {}
    if case["sparse"]:
        triton_backend.rsparse_linear(*call.args(), packed)
    else:
        weight, bias = call.operands.weight, call.bias
        triton_backend.dense_linear(call.x, weight, bias, packed)
        tiles = LaunchConfig(64, 32, 2, 4, 2, use_dot=True)
        triton_backend.dense_linear(call.x, weight, bias, tiles)
        quantized_linear.dequantise(weight, dtype)
    print(json.dumps(made), flush=True)
"""
WEIGHTS = (
    "w4a16-g128",
    "w4a16-asym-g32",
    "awq",
    "fp8-channel",
    "fp8-block",
    "int8-planes",
)
DENSE = [
    {"weight": weight, "dtype": dtype, "tokens": 1, "even": True, "sparse": False}
    for weight in WEIGHTS
    for dtype in ("bfloat16", "float16")
]
SPARSE = [
    {
        "weight": weight,
        "dtype": "bfloat16",
        "tokens": tokens,
        "even": even,
        "sparse": True,
    }
    for weight in WEIGHTS
    for tokens, even in ((1, True), (2, False), (8, False))
]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, str]]:
    """PTX of every kernel by its name, by case."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    cases = DENSE + SPARSE
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(cases)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = map(json.loads, done.stdout.splitlines()[-len(cases) :])
    return {str(case): one for case, one in zip(cases, made, strict=True)}


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_words_become_operands_where_they_are(case, compiled):
    made = compiled[str(case)]
    packed = made["packed_kernel"]
    # 16 bytes a thread: the four channels of a step.
    loads = re.findall(r"ld\.global\.L1::evict_first\S*\.v4\.b32.*", packed)
    assert len(loads) == 4
    # One instruction for 16 columns and 8 slots; eight threads share four words each.
    columns = 128 if "fp8" in case["weight"] else 256
    assert packed.count("mma.sync.aligned.m16n8k16") == columns // 16
    # From the loads to the last product no word is passed on to another thread. Triton
    # 3.9 orders the threads of a load otherwise and passes every word on once, by
    # shuffles: right, and not measured.
    if TRITON < (3, 7):
        begin, end = packed.index(loads[0]), packed.rindex("mma.sync")
        assert not re.search(r"shfl\.sync|(st|ld)\.shared|matrix", packed[begin:end])
    assert "mma" in made["dense_kernel"]
    assert made["dequantise_kernel"]
    assert made["finish_kernel"]


@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_sparse_compiles(case, compiled):
    assert "mma.sync.aligned.m16n8k16" in compiled[str(case)]["packed_kernel"]
