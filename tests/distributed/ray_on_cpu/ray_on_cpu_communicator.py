# SPDX-License-Identifier: Apache-2.0
"""How ranks talk under ``ray_on_cpu``; apart, as it needs the platform to be known."""

import socket

import torch
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class Communicator(CpuCommunicator):
    """Shared memory within a host, TCP (gloo) between hosts.

    The nodes of the tests are one machine, so vLLM would find shared memory between
    them, which real hosts do not have.
    """

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        hosts: list[str] = [""] * self.world_size
        torch.distributed.all_gather_object(
            hosts, socket.gethostname(), group=self.device_group
        )
        return len(set(hosts)) == 1
