# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of one or two nodes on one machine, for the scripts of this folder.

A script first moves itself into namespaces of its own (``enter_namespaces``): network,
mounts, processes, host name. It is then the host ``node-a``. A second node is a Ray
node in further namespaces, ``node-b``, joined by a pair of virtual interfaces: its own
address, its own host name, and files that can be made to differ. When the script ends,
the kernel ends everything that it started.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
SUBNET = "10.213.77"
HEAD = f"{SUBNET}.1"
_PORT = 6379
_INTERFACE = "rsparse0"
_INSIDE = "RSPARSE_TEST_NAMESPACES"


def enter_namespaces() -> None:
    """Run this script again in namespaces of its own; returns when inside.

    Raises:
        SystemExit: the kernel does not allow it here (status 77, "skipped").
    """
    if os.environ.get(_INSIDE):
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        subprocess.run(["hostname", "node-a"], check=True)
        return
    command = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork"]
    command += ["--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        command += ["--user", "--map-root-user"]
    missing = [tool for tool in ("unshare", "ip") if shutil.which(tool) is None]
    if missing or subprocess.run([*command, "true"], capture_output=True).returncode:
        why = f"no {missing[0]} on PATH" if missing else "unshare is not permitted"
        print(f"skipped: namespaces cannot be made here ({why})", file=sys.stderr)
        raise SystemExit(77)
    os.environ[_INSIDE] = "1"
    os.execvp(command[0], [*command, sys.executable, *sys.argv])


class RayCluster:
    """A Ray head on ``node-a`` and, with two nodes, a second Ray node on ``node-b``.

    Args:
        folder: where Ray keeps its session and logs; a short path (sockets).
        nodes: 1 or 2.
        devices: logical devices of each node; a worker takes one.
        prepare_b: shell commands that node-b runs before Ray, in its own mounts.
    """

    def __init__(
        self, folder: Path, nodes: int, devices: int, prepare_b: str = "true"
    ) -> None:
        self.folder, self.nodes, self.devices = folder, nodes, devices
        self.prepare_b = prepare_b
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def environment(self) -> dict[str, str]:
        """What the driver needs to use this cluster from node-a."""
        return {
            "PYTHONPATH": str(HERE / "ray_on_cpu"),
            "RAY_ADDRESS": f"{HEAD}:{_PORT}",
            "VLLM_HOST_IP": HEAD,
            "GLOO_SOCKET_IFNAME": _INTERFACE,
            # By default Ray's workers run at the lowest priority but four.
            "RAY_worker_niceness": "0",
            "RAY_DEDUP_LOGS": "0",
            "RAY_COLOR_PREFIX": "0",
        }

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End both nodes and everything that Ray started, and remove the interfaces."""
        # Only processes of our own namespace are seen, and so ended.
        stop = [BIN / "ray", "stop", "--force", "--grace-period=0"]
        subprocess.run(stop, capture_output=True)
        while self.processes:
            _, process = self.processes.popitem()
            process.kill()
            process.wait()
        subprocess.run(["ip", "link", "del", _INTERFACE], capture_output=True)

    def run_b(self, command: str) -> None:
        """Run shell commands in node-b's namespaces."""
        pid = str(self.processes["node-b"].pid)
        enter = ["nsenter", "--target", pid, "--net", "--mount", "--uts"]
        subprocess.run([*enter, "sh", "-ec", command], check=True)

    def _start(self) -> None:
        ip = ["ip", "link"]
        pair = [_INTERFACE, "type", "veth", "peer", "name", f"{_INTERFACE}b"]
        subprocess.run([*ip, "add", *pair], check=True)
        self._run("node-a", _address(HEAD, _INTERFACE) + self._ray(HEAD, head=True))
        if self.nodes == 1:
            return
        address = f"{SUBNET}.2"
        log = self.folder / "node-b"
        log.mkdir()
        # The session folder is the head's on every node: node-b gets one of its own.
        script = f"""
            hostname node-b
            ip link set lo up
            until ip link show {_INTERFACE}b >/dev/null 2>&1; do sleep 0.05; done
            mount --bind {log} {self.folder}/ray
            {_address(address, f"{_INTERFACE}b")}
            ip link set {_INTERFACE}b down
            ip link set {_INTERFACE}b name {_INTERFACE}
            ip link set {_INTERFACE} up
            {self.prepare_b}
            {self._ray(address, head=False)}
        """
        process = self._run("node-b", script, "unshare", "--net", "--mount", "--uts")
        time.sleep(0.5)  # until unshare has made the namespace
        move = [*ip, "set", f"{_INTERFACE}b", "netns", str(process.pid)]
        subprocess.run(move, check=True)
        self._wait_for_nodes()

    def _ray(self, address: str, head: bool) -> str:
        role = f"--head --port={_PORT}" if head else f"--address={HEAD}:{_PORT}"
        temp = f"--temp-dir={self.folder}/ray --include-dashboard=false" if head else ""
        return (
            f"exec {BIN}/ray start {role} {temp} --node-ip-address={address}"
            f" --num-gpus={self.devices} --num-cpus=2 --object-store-memory=80000000"
            " --disable-usage-stats --block"
        )

    def _run(self, name: str, script: str, *prefix: str) -> "subprocess.Popen[bytes]":
        (self.folder / "ray").mkdir(exist_ok=True)
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [*prefix, "sh", "-ec", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={
                    **os.environ,
                    **self.environment(),
                    "VLLM_HOST_IP": HEAD if name == "node-a" else f"{SUBNET}.2",
                },
            )
        return self.processes[name]

    def _wait_for_nodes(self, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        count = "import ray; ray.init(log_to_driver=False); print(len(ray.nodes()))"
        while True:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    log = (self.folder / f"{name}.log").read_text(errors="replace")
                    raise RuntimeError(f"ray on {name} exited:\n{log[-4000:]}")
            probe = subprocess.run(
                [sys.executable, "-c", count],
                capture_output=True,
                text=True,
                cwd=self.folder,
                env={**os.environ, **self.environment()},
            )
            if probe.stdout.strip().endswith(str(self.nodes)):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"no {self.nodes} Ray nodes:\n{probe.stderr[-4000:]}"
                )
            time.sleep(0.5)


def _address(address: str, interface: str) -> str:
    return f"ip addr add {address}/24 dev {interface}\nip link set {interface} up\n"
