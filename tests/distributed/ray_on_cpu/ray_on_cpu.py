# SPDX-License-Identifier: Apache-2.0
"""Test-only platform plug-in of vLLM: Ray on machines without a GPU.

vLLM's CPU platform names no Ray resource and so refuses Ray. Here logical GPUs, as
given to ``ray start --num-gpus``, stand for CPU workers. In effect where this folder is
on PYTHONPATH, and nowhere else.
"""

from vllm.platforms.cpu import CpuPlatform


class RayOnCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "ray_on_cpu_communicator.Communicator"


def activate() -> str:
    return "ray_on_cpu.RayOnCpuPlatform"
