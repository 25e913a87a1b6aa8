# SPDX-License-Identifier: Apache-2.0
"""Every kind of kernel compiles for Hopper; needs no GPU, only Triton's own compiler.

The interpreter runs Python, which accepts what the compiler does not. A child process
compiles: this one may have Triton in interpreter mode, which is decided at import.
"""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CHILD = """
import json, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_rsparse.kernels.programs import finish_kernel, sums_kernel

def build(kernel, constants, pointers, shards, warps):
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[name] = "constexpr", constants[name]
        elif name in ("shard_sizes", "ranks"):
            signature[name] = ("i32",) * shards
            for member in range(shards):
                attributes[index, member] = [["tt.divisibility", 16]]
        elif name.endswith("_ptr") and name not in pointers:
            signature[name], constexprs[name] = "constexpr", None
        else:
            signature[name] = pointers.get(name, "i32")
            if name not in ("tokens", "splits"):
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": warps})

case = json.loads(sys.argv[1])
shards, factors, tokens = case["shards"], case["factors"], case["tokens"]
use_dot, listed = case["kind"] == "dot", case["kind"] == "listed"
pointers = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "threshold_ptr": "*fp32",
            "out_ptr": "*bf16", "partial_ptr": "*fp32"}
if listed:
    pointers |= {"list_ptr": "*i32", "value_ptr": "*bf16"}
if factors:
    pointers |= {"v_ptr": "*bf16", "u_ptr": "*bf16", "correction_ptr": "*fp32"}
sums = build(sums_kernel, dict(
    SHARDS=shards, FACTORS=factors, DIRECT=False, USE_DOT=use_dot, LISTED=listed,
    BLOCK_M=16 if use_dot else tokens, BLOCK_N=256, BLOCK_K=16, ROWS=2,
    RANK_BLOCK_N=64, RANK_ROWS=8, CHANNELS=128 if listed else None, EVEN_N=case["even"],
    STAGES=2, DOT_DTYPE=tl.bfloat16, WIDE=case["wide"], PDL=True, stride_vr=1,
), pointers, shards, 2)
finish = build(finish_kernel, dict(
    SHARDS=shards, FACTORS=factors, SPLITS_BLOCK=32, BLOCK_N=64, BLOCK_R=64, PDL=True,
    stride_un=1,
), pointers, shards, 4)
print(json.dumps({"ptx": sums.asm["ptx"], "finish": len(finish.asm["cubin"])}))
"""


def compile_case(**case: object) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(case)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "case",
    [
        {"kind": "listed", "tokens": 1, "even": True, "wide": False},
        {"kind": "listed", "tokens": 2, "even": False, "wide": True},
        {"kind": "masked", "tokens": 1, "even": True, "wide": False},
        {"kind": "masked", "tokens": 2, "even": False, "wide": True},
        {"kind": "dot", "tokens": 8, "even": True, "wide": False},
    ],
    ids=lambda case: f"{case['kind']}-{case['tokens']}",
)
@pytest.mark.parametrize(("shards", "factors"), [(1, False), (3, True)])
def test_compiles(case: dict, shards: int, factors: bool) -> None:
    made = compile_case(**case, shards=shards, factors=factors)
    assert made["finish"] > 0
    if case["kind"] != "dot":
        # 16 bytes a thread, or a row of the weight takes eight times the instructions.
        assert re.search(r"ld\.global\.L1::evict_first\S*\.v4\.b32", made["ptx"])
