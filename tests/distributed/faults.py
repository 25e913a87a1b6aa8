# SPDX-License-Identifier: Apache-2.0
"""What clients see when a part of the server fails, and that a restart serves again.

    python tests/distributed/faults.py [--only NAME,...] [--dense] [--keep FOLDER]

Four clients stream from ``vllm serve``, then something is broken. Each client's text
must be a beginning of what the undisturbed server writes: an error is fine, other text
is not. Faults at start are a server that must refuse. Exit status 1 when an expectation
fails, 77 where namespaces cannot be made.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import openai
from cluster import enter_namespaces
from scene import (
    Row,
    Scene,
    Server,
    broken_while_streaming,
    judge,
    refused_at_start,
    watch,
)
from stream_client import Client
from tokens import Layout

from vllm_rsparse.testing.server import ServerError, exit_on_signals

SITE_PACKAGES = Path(openai.__file__).resolve().parents[1]
MP = Layout("mp", 1, 2, 1)
RAY = Layout("ray", 2, 2, 1)


def kill_process(title: str) -> None:
    """SIGKILL to the last process of our namespace whose command line has ``title``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        if title in command:
            found.append(int(path.parent.name))
    if not found:
        raise RuntimeError(f"no process {title}")
    os.kill(max(found), signal.SIGKILL)


def mp_worker(scene: Scene) -> Row:
    name = "worker killed (mp, TP 2)"
    return broken_while_streaming(
        scene, MP, name, lambda _: kill_process("VLLM::Worker_TP1")
    )


def ray_worker(scene: Scene) -> Row:
    name = "worker killed (Ray, TP 2 on two nodes)"
    return broken_while_streaming(
        scene, RAY, name, lambda _: kill_process("ray::RayWorkerProc")
    )


def ray_node(scene: Scene) -> Row:
    def kill_raylet(server: Server) -> None:
        assert server.cluster is not None
        node = server.cluster.processes["node-b"]
        node.kill()
        node.wait()

    name = "node killed: all of Ray on node-b"
    return broken_while_streaming(scene, RAY, name, kill_raylet)


def sigterm(scene: Scene) -> Row:
    name = "SIGTERM to the server (mp, TP 2)"
    return broken_while_streaming(
        scene, MP, name, lambda server: os.kill(server.process.pid, signal.SIGTERM)
    )


def artifact_missing(scene: Scene) -> Row:
    hide = f"mount -t tmpfs none {scene.model}/rsparse"
    words = ["the nodes of this server differ", "node-b (10.213.77.2) has none"]
    return refused_at_start(scene, RAY, "no artifact on node-b", words, hide)


def artifact_differs(scene: Scene) -> Row:
    other = scene.folder / "other"
    shutil.copytree(scene.model / "rsparse", other, dirs_exist_ok=True)
    tensors = other / "rsparse.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    mount = f"mount --bind {other} {scene.model}/rsparse"
    words = ["the nodes of this server differ", "node-b (10.213.77.2) has"]
    return refused_at_start(scene, RAY, "another artifact on node-b", words, mount)


def version_differs(scene: Scene) -> Row:
    (info,) = SITE_PACKAGES.glob("vllm_rsparse-*.dist-info")
    other = scene.folder / "METADATA"
    text = (info / "METADATA").read_text()
    other.write_text(text.replace("\nVersion: ", "\nVersion: 99.", 1))
    mount = f"mount --bind {other} {info}/METADATA"
    words = ["vllm-rsparse: ", "node-b (10.213.77.2) has 99."]
    return refused_at_start(scene, RAY, "another version on node-b", words, mount)


def package_missing(scene: Scene) -> Row:
    import vllm_rsparse

    hide = f"mount -t tmpfs none {Path(vllm_rsparse.__file__).parent}"
    words = ["vllm_rsparse", "10.213.77.2"]
    return refused_at_start(scene, RAY, "vllm-rsparse missing on node-b", words, hide)


def disk_full(scene: Scene) -> Row:
    """Caches and temporary files have no room: no start, an error, or the right text.

    vLLM's embedding compiles a function at its first call where ranks share it, after
    ``/health`` says 200, and that needs a file.
    """
    row = Row("disk full at start (mp, TP 2)", "no server", "refused", "ends")
    full = scene.folder / "full"
    full.mkdir()
    os.system(f"mount -t tmpfs -o size=64k none {full} && cat /dev/zero >{full}/x")
    places = ("TMPDIR", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")
    clients: list[Client] = []
    try:
        with scene.serve(MP, None, **dict.fromkeys(places, str(full))) as server:
            clients = server.clients(scene.prompts)
            row.health, row.exit = watch(server.process, time.monotonic(), 30)
    except ServerError as error:
        row.problems += [] if "No space left" in str(error) else [f"says {error}"]
    finally:
        os.system(f"umount {full}")
    scene.expected.pop(MP.name, None)
    with scene.serve(MP) as server:  # with room again
        expected = scene.learn(MP, server)
        row.restart = "serves"
    if clients:
        judge(row, clients, expected)
    return row


FAULTS = {
    function.__name__: function
    for function in (
        mp_worker,
        ray_worker,
        ray_node,
        sigterm,
        artifact_missing,
        artifact_differs,
        version_differs,
        package_missing,
        disk_full,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(FAULTS), help="default %(default)s")
    parser.add_argument("--dense", action="store_true", help="max_sparse_tokens 0")
    parser.add_argument("--keep", type=Path, help="folder for the servers' logs")
    arguments = parser.parse_args()
    keep = arguments.keep and arguments.keep.resolve()
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    chosen = arguments.only.split(",")
    unknown = set(chosen) - set(FAULTS)
    if unknown:
        parser.error(f"--only: no fault {', '.join(unknown)}; see --help")
    enter_namespaces()
    exit_on_signals()
    problems = []
    with tempfile.TemporaryDirectory(prefix="rs-", dir="/tmp") as temporary:
        os.chdir(temporary)  # Ray puts the driver's directory on its workers' sys.path
        scene = Scene(Path(temporary), keep, arguments.dense)
        print("| fault | clients | /health | server | restart |")
        print("|---|---|---|---|---|", flush=True)
        for name in chosen:
            row = FAULTS[name](scene)
            print(row, flush=True)
            problems += [f"{name}: {problem}" for problem in row.problems]
    print("\n".join(problems), file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
