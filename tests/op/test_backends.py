# SPDX-License-Identifier: Apache-2.0
"""Which backend runs where, and with which formats."""

import pytest

from vllm_rsparse.errors import RSparseError
from vllm_rsparse.formats.fp8 import FP8
from vllm_rsparse.op.backends import Backend, resolve_backend, routes_of


def test_a_format_that_a_backend_cannot_read_is_refused():
    with pytest.raises(RSparseError, match=r"cpu-torch cannot .* fp8; .*reference"):
        routes_of(Backend.CPU_TORCH, FP8)


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", "cuda", Backend.TRITON),
        ("auto", "cpu", Backend.CPU),
        ("reference", "cpu", Backend.REFERENCE),
        ("reference", "cuda", Backend.REFERENCE),
        ("triton", "cuda", Backend.TRITON),
        ("cpu", "cpu", Backend.CPU),
        ("cpu-torch", "cpu", Backend.CPU_TORCH),
    ],
)
def test_backend_choice(name, device, expected):
    assert resolve_backend(name, device) is expected


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("cpu", "cuda", "SETTING is 'cpu', but the model runs on cuda"),
        ("cpu-torch", "cuda", "SETTING is 'cpu-torch', but the model runs on cuda"),
        ("triton", "cpu", "SETTING is 'triton', but the model runs on cpu"),
        (
            "fast",
            "cpu",
            "SETTING is 'fast'; allowed are auto, reference, cpu, triton, cpu-torch",
        ),
        ("auto", "xpu", "no kernels for device 'xpu'"),
    ],
)
def test_named_backend_runs_or_raises(monkeypatch, name, device, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        resolve_backend(name, device, "SETTING")
