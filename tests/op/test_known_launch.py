# SPDX-License-Identifier: Apache-2.0
"""Launches whose program is known are those that Triton itself would make."""

import pytest

pytest.importorskip("triton")

from vllm_rsparse.kernels.known_launch import number_class
from vllm_rsparse.kernels.sizes import cdiv, next_power_of_2

from .launched import run_launches

BOTH = """
from vllm_rsparse.kernels.known_launch import KnownLaunches

def compared(module, name, call, case):
    '''The launch of a call, and what Triton makes of the same call.'''
    kept = getattr(module, name)
    launches.clear()
    call()
    setattr(module, name, KnownLaunches(kept._kernel, **kept._options))
    call()
    setattr(module, name, kept)
    found, expected = launches
    assert found == expected, (case, found, expected)
    return found[1]

def twice(module, name, call, case):
    '''The program of a call; the second time it is known.'''
    first = compared(module, name, call, case)
    known = len(getattr(module, name)._programs)
    assert compared(module, name, call, case) == first
    assert len(getattr(module, name)._programs) == known, case
    return first

def moved(tensor, count):
    '''The same elements, that many elements behind an aligned address.'''
    memory = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)
    assert memory.data_ptr() % 64 == 0
    place = memory[count : count + tensor.numel()]
    return place.copy_(tensor.reshape(-1)).view(tensor.shape)
"""

ROUND_AND_TURN = """
from vllm_rsparse.formats.fp8 import FP8
from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.kernels import fp8_product

def weight_of(n, k):
    data = torch.zeros(k, n).to(torch.float8_e4m3fn)
    weight = StoredWeight(FP8, data.t(), n, k, torch.ones(n))
    addresses[data.data_ptr()] = f"{n} {k} {len(addresses)}"
    return weight

def program(x, weight, case):
    call = lambda: fp8_product.round_and_turn(x, weight)
    return twice(fp8_product, "_round_and_turn", call, case)

one, two, small = weight_of(128, 64), weight_of(128, 64), weight_of(24, 40)
x = torch.zeros(64, 64, dtype=torch.bfloat16)
wide = torch.zeros(64, 73, dtype=torch.bfloat16)
base = program(x, one, "base")
assert program(x, two, "a layer of the same shape") == base
assert program(x[:32], one, "tokens") == base
assert program(x[:33], one, "odd tokens") != base
assert program(x[:1], one, "one token") not in (base, program(x[:33], one, "again"))
assert program(x.float(), one, "dtype") != base
assert program(x[:32].repeat(1, 2)[:, :64], one, "rows apart") == base
assert program(wide[:, :64], one, "odd stride") != base
assert program(wide.view(-1)[1:4097].view(64, 64), one, "odd address") != base
assert program(x[:, :40], small, "another shape") != base
assert program(x.t().contiguous().t(), one, "channels apart") == base

data = one.data
one.data.data = moved(data.t(), 1).t()
assert program(x, one, "moved to an odd address") != base
addresses[data.data_ptr()] = "moved"
one.data.data = moved(data.t(), 16).t()
assert program(x, one, "moved back") == base
print("done")
"""

DEQUANTISE = """
from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.fp8 import FP8
from vllm_rsparse.formats.int4 import INT4
from vllm_rsparse.formats.int8_planes import INT8_PLANES
from vllm_rsparse.kernels import scratch_linear

def weight_of(format, n=128, k=64, dtype=torch.bfloat16, zeros=True, group=32):
    shape = (2, k, n // 8) if format is INT8_PLANES else (k, n // 8)
    data = torch.zeros(shape, dtype=torch.int32)
    addresses[data.data_ptr()] = f"data {len(addresses)}"
    scales = torch.ones(k // group, n, dtype=dtype)
    addresses[scales.data_ptr()] = f"scales {len(addresses)}"
    packed = torch.zeros(k // group, n // 8, dtype=torch.int32) if zeros else None
    return StoredWeight(format, data, n, k, scales, packed, group)

def program(weight, case, dtype=torch.bfloat16, name="_dequantise_pairs"):
    call = lambda: scratch_linear.dequantise(weight, dtype)
    return twice(scratch_linear, name, call, case)

base = program(weight_of(INT4), "int4")
assert program(weight_of(INT4), "a layer of the same shape") == base
assert program(weight_of(INT4, zeros=False), "no zero points") != base
assert program(weight_of(INT4, k=128, group=64), "groups") != base
assert program(weight_of(INT4, n=136), "odd words") != base
assert program(weight_of(INT8_PLANES), "planes") != base

weight = weight_of(INT4)
for name, count in (("data", 1), ("scales", 2), ("zeros", 1)):
    kept = getattr(weight, name).data
    getattr(weight, name).data = moved(kept, count)
    assert program(weight, f"{name} at an odd address") != base
    getattr(weight, name).data = moved(kept, 0)
    assert program(weight, f"{name} moved back") == base

other = program(weight_of(INT4), "float16", torch.float16, "_dequantise")
scaled = weight_of(INT4, dtype=torch.float16)
assert program(scaled, "other scales", torch.float16, "_dequantise") != other
weight.scales.data = moved(weight.scales.data, 1)
program(weight, "a pair of scales in two words", name="_dequantise")
fp8 = torch.zeros(64, 128).to(torch.float8_e4m3fn).t()
fp8 = StoredWeight(FP8, fp8, 128, 64, torch.ones(128))
assert program(fp8, "fp8", name="_dequantise") != other
print("done")
"""


@pytest.mark.parametrize(
    "code", [ROUND_AND_TURN, DEQUANTISE], ids=["round-and-turn", "dequantise"]
)
def test_a_known_program_is_what_triton_would_launch(code):
    assert run_launches(BOTH + code) == "done\n"


def test_sizes():
    for value in range(1, 70):
        assert cdiv(value, 8) == (value + 7) // 8
        power = next_power_of_2(value)
        assert power & (power - 1) == 0
        assert value <= power < 2 * value
    assert cdiv(0, 8) == 0
    assert number_class(1) != number_class(17) != number_class(16)
    assert number_class(2**31 - 16) != number_class(2**31)
