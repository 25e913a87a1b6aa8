# SPDX-License-Identifier: Apache-2.0
"""Launches whose program is known are those that Triton itself would make."""

import pytest

pytest.importorskip("triton")

from vllm_rsparse.kernels.sizes import cdiv, next_power_of_2

from .launched import run_launches

BOTH = """
from vllm_rsparse.kernels import known_launch

def alone(call):
    '''The launch of a call of which nothing is known: Triton's own.'''
    known, known_launch._programs = known_launch._programs, {}
    launches.clear()
    call()
    known_launch._programs = known
    return launches[0]

def program(call, case):
    '''The program of a call. It is known the second time at the latest.'''
    expected = alone(call)
    for _ in range(2):
        known = len(known_launch._programs)
        launches.clear()
        call()
        assert launches == [expected], (case, launches, expected)
    assert len(known_launch._programs) == known, case
    return expected[1]

def moved(tensor, count):
    '''The same elements, that many elements behind an aligned address.'''
    memory = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)
    assert memory.data_ptr() % 64 == 0
    place = memory[count : count + tensor.numel()]
    return place.copy_(tensor.reshape(-1)).view(tensor.shape)
"""

CLASSES = """
import triton.language as tl
from tests.op.small_kernel import Rows, small_kernel

x, out, scale = torch.zeros(64, 64), torch.zeros(64), torch.ones(64)
FIRST = dict(rows=Rows(x, 64), out=out, scale=None, count=32, sizes=(32, 7))
OPTIONS = dict(num_warps=4, SHAPE=(0, None), DTYPE=tl.float32)

def changed(case, **changes):
    options = OPTIONS | {k: v for k, v in changes.items() if k in OPTIONS or "_" in k}
    arguments = [changes.get(name, value) for name, value in FIRST.items()]
    device, grid = torch.device("cpu"), changes.get("grid", (1, 2, 3))
    call = lambda: known_launch.launch(
        small_kernel, device, grid, *arguments, **options
    )
    return program(call, case)

base = changed("nothing")
same = [
    changed("the grid", grid=(7, 1, 1)),
    changed("a multiple of 16", count=48),
    changed("another of a tuple", sizes=(16, 7)),
    changed("other odd sizes", sizes=(32, 5)),
    changed("another tensor", rows=Rows(torch.zeros(2, 128), 128)),
    changed("a parameter", out=torch.nn.Parameter(out, requires_grad=False)),
    changed("zero", count=0),
]
assert same == [base] * len(same), same
other = [
    changed("odd", count=33),
    changed("one", count=1),
    changed("64 bits", count=2**31),
    changed("64 bits, odd", count=2**31 + 1),
    changed("one in a tuple", sizes=(1, 7)),
    changed("odd in a tuple", sizes=(3, 7)),
    changed("longer tuple", sizes=(32, 7, 7)),
    changed("stride of a tuple", rows=Rows(x, 65)),
    changed("a dtype in a tuple", rows=Rows(x.half(), 64)),
    changed("an address in a tuple", rows=Rows(moved(x, 1), 64)),
    changed("a dtype", out=out.half()),
    changed("an address", out=moved(out, 1)),
    changed("not None", scale=scale),
    changed("not None, odd", scale=moved(scale, 3)),
    changed("warps", num_warps=2),
    changed("stages", num_stages=1),
    changed("constants", SHAPE=(1, None)),
    changed("a type", DTYPE=tl.float16),
]
assert base not in other
assert len(set(other)) >= len(other) - 1  # the number of stages changes nothing here
try:
    options = dict(reversed(OPTIONS.items()))
    known_launch.launch(small_kernel, torch.device("cpu"), (1, 1, 1), *FIRST.values(),
        **options)
except TypeError as error:
    print(error)
"""

PROMPTS = """
from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.fp8 import FP8
from vllm_rsparse.formats.int4 import INT4
from vllm_rsparse.kernels import fp8_product, scratch_linear

def fp8_of(n, k):
    data = torch.zeros(k, n).to(torch.float8_e4m3fn)
    addresses[data.data_ptr()] = f"data {len(addresses)}"
    return StoredWeight(FP8, data.t(), n, k, torch.ones(n))

def int4_of(n, k):
    data = torch.zeros(k, n // 8, dtype=torch.int32)
    addresses[data.data_ptr()] = f"data {len(addresses)}"
    scales = torch.ones(k // 32, n, dtype=torch.bfloat16)
    addresses[scales.data_ptr()] = f"scales {len(addresses)}"
    return StoredWeight(INT4, data, n, k, scales, None, 32)

def turned(x, weight, case):
    return program(lambda: fp8_product.round_and_turn(x, weight), case)

def widened(weight, case):
    return program(lambda: scratch_linear.dequantise(weight, torch.bfloat16), case)

x = torch.zeros(64, 64, dtype=torch.bfloat16)
one, two = fp8_of(128, 64), fp8_of(128, 64)
base = turned(x, one, "base")
assert turned(x, two, "a layer of the same shape") == base
assert turned(x[:32], two, "tokens") == base
assert turned(x[:33], two, "odd tokens") != base
assert turned(x[:1], two, "one token") != base
assert turned(x.t().contiguous().t(), one, "channels apart") == base
kept = one.data.t()
one.data.data = moved(kept, 1).t()
assert turned(x, one, "moved to an odd address") != base
addresses[one.data.data_ptr()] = "moved"
assert turned(x, one, "its address") != base
one.data.data = kept.t()
assert turned(x, one, "moved back") == base

one, two = int4_of(128, 64), int4_of(128, 64)
base = widened(one, "base")
assert widened(two, "a layer of the same shape") == base
one.scales.data = moved(one.scales.data, 2)
assert widened(one, "moved to an odd address") != base
one.scales.data = moved(one.scales.data, 1)
widened(one, "a pair of scales in two words")
assert launches[0][2][1] is None  # without pairs: the scales of fp8
print("done")
"""


def test_a_known_program_is_what_triton_would_launch():
    """Of arguments that differ in one thing each; and the constants are checked."""
    names = "['SHAPE', 'DTYPE'], got ['DTYPE', 'SHAPE']"
    assert run_launches(BOTH + CLASSES) == f"the kernel's constants are {names}\n"


def test_prompts_on_weights_that_move():
    assert run_launches(BOTH + PROMPTS) == "done\n"


BOXES = """
from vllm_rsparse.formats.int8_planes import encode_planes
from vllm_rsparse.kernels.byte_linear import byte_linear
from vllm_rsparse.kernels.launch_config import LaunchConfig, Rounding

x = torch.zeros(16, 128, dtype=torch.bfloat16)
one, two = (encode_planes(torch.randn(256, 128), 128, torch.bfloat16) for _ in "12")

def multiplied(weight, columns):
    launches.clear()
    config = LaunchConfig(columns, 128, 1, columns // 32, 3, False, packed=True)
    byte_linear(x, weight, None, config, Rounding(128, 2))
    boxes = launches[1][2][1]
    address = weight.data.data_ptr()
    assert (boxes.base.data_ptr(), boxes.block_shape) == (address, [128, columns // 4])
    return launches[1][1]

base = multiplied(one, 128)
assert multiplied(one, 128) == multiplied(two, 128) == base
assert multiplied(two, 256) != base
print("done")
"""


def test_boxes_of_another_weight():
    assert run_launches(BOXES) == "done\n"


def test_sizes():
    for value in range(1, 70):
        assert cdiv(value, 8) == (value + 7) // 8
        power = next_power_of_2(value)
        assert power & (power - 1) == 0
        assert value <= power < 2 * value
    assert cdiv(0, 8) == 0
