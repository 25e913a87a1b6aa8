# SPDX-License-Identifier: Apache-2.0
"""Launches of compiled kernels without a GPU: what reaches the driver.

A child process compiles for Hopper with a driver that runs nothing and notes the
program, the grid and the arguments of every launch. This process may have Triton in
interpreter mode, which is decided at import.
"""

import os
import subprocess
import sys

BEFORE = """
import itertools
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

handles = itertools.count(1)
launches = []

class Utils:
    def load_binary(self, name, kernel, shared, device):
        return 1, next(handles), 0, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, x, y, z, stream, function, *args):
        # Metadata and hooks come first.
        launches.append(((x, y, z), function, plain(args[4:])))

class Hopper:
    utils = Utils()
    launcher_cls = Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

def plain(value):
    if isinstance(value, tuple):
        return tuple(plain(one) for one in value)
    if isinstance(value, torch.Tensor):
        return str(value.dtype), addresses.get(value.data_ptr(), "new")
    return value

# Tensors that outlive a launch, by address.
addresses = {}
driver.set_active(Hopper())
"""


def run_launches(code: str) -> str:
    """What code prints that can use ``launches``, a list that launches are added to.

    Each is (grid, the program's handle, arguments), where a tensor is its dtype and
    what ``addresses`` has for its address.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
