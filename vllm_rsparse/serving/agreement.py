# SPDX-License-Identifier: Apache-2.0
"""All ranks of a server run the same code on the same artifact, or none serves.

Ranks on several nodes read what is installed and stored there. A node with another
version or artifact would add its share of a sum under another mask: wrong tokens
without an error. The ranks therefore compare reports once, before any weight is loaded.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed

from vllm_rsparse.errors import NodesDisagreeError
from vllm_rsparse.releases import installed

_PACKAGES = ("vllm", "vllm-rsparse", "torch")


@dataclass(frozen=True)
class Report:
    """What one process found on its node.

    Attributes:
        node: host name and address, for messages.
        facts: what must be equal everywhere, name -> value.
    """

    node: str
    facts: Mapping[str, str]


def local_report(**facts: str) -> Report:
    """This process's report: the installed versions and the given facts."""
    versions = {name: installed(name) or "none" for name in _PACKAGES}
    return Report(_node_name(), {**versions, **facts})


def require_agreement(reports: Sequence[Report]) -> None:
    """Check that all reports have the same facts.

    Raises:
        NodesDisagreeError: names every fact that differs, its values and their nodes.
    """
    differences = []
    for name in dict.fromkeys(name for report in reports for name in report.facts):
        nodes: dict[str, list[str]] = {}
        for report in reports:
            found = nodes.setdefault(report.facts.get(name, "unknown"), [])
            if report.node not in found:
                found.append(report.node)
        if len(nodes) > 1:
            values = "; ".join(f"{', '.join(n)} has {v}" for v, n in nodes.items())
            differences.append(f"{name}: {values}")
    if differences:
        raise NodesDisagreeError(
            "rsparse: the nodes of this server differ. "
            + ". ".join(differences)
            + ". Install the same versions on every node, and put the same prepared"
            " directory at the same path on each"
        )


def gather_reports(
    mine: Report, group: "torch.distributed.ProcessGroup | None"
) -> list[Report]:
    """The reports of all ranks of a process group, in their order.

    Collective: every rank of the group must call it. None returns ``mine`` alone.
    """
    if group is None:
        return [mine]
    reports: list[Report] = [mine] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(reports, mine, group=group)
    return reports


def _node_name() -> str:
    # vLLM's own variable for a node's address; Ray and vLLM both ask users to set it
    # where a host has several.
    address = os.environ.get("VLLM_HOST_IP")
    name = socket.gethostname()
    return f"{name} ({address})" if address else name
