# SPDX-License-Identifier: Apache-2.0
"""What clients see when a part of the server fails, and that a restart serves again.

    python tests/distributed/faults.py [--only NAME,...] [--keep FOLDER]

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
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
from cluster import BIN, RayCluster, enter_namespaces
from tokens import Layout, prepare, read_prompts, serve_options

from vllm_rsparse.serving import ServerError, ServerProcess, exit_on_signals

CLIENTS = 4
STREAM_TOKENS = 200
SITE_PACKAGES = Path(openai.__file__).resolve().parents[1]


@dataclass
class Client:
    """One streaming request and what became of it."""

    prompt: str
    text: str = ""
    chunks: int = 0
    end: str = ""
    thread: threading.Thread | None = None

    def start(self, base_url: str, model: str) -> None:
        arguments = (base_url, model)
        self.thread = threading.Thread(target=self._stream, args=arguments, daemon=True)
        self.thread.start()

    def _stream(self, base_url: str, model: str) -> None:
        client = openai.OpenAI(
            base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=60
        )
        try:
            stream = client.completions.create(
                model=model,
                prompt=self.prompt,
                max_tokens=STREAM_TOKENS,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for chunk in stream:
                self.chunks += 1
                self.text += chunk.choices[0].text
                if chunk.choices[0].finish_reason:
                    self.end = f"finished ({chunk.choices[0].finish_reason})"
            self.end = self.end or "stream closed without a finish reason"
        except openai.APIStatusError as error:
            self.end = f"HTTP {error.status_code}"
        except (openai.APIError, httpx.HTTPError) as error:
            cause = error.__cause__ or error
            self.end = f"{type(cause).__name__}: {cause}"[:120]


@dataclass
class Server:
    """A running server with what its cluster and restart need."""

    process: ServerProcess
    cluster: RayCluster | None
    model: Path

    def clients(self, prompts: list[str]) -> list[Client]:
        found = [Client(prompt) for prompt in prompts]
        for client in found:
            client.start(self.process.base_url, str(self.model))
        return found


@dataclass
class Row:
    """A line of the table."""

    fault: str
    clients: str = ""
    health: str = ""
    exit: str = ""
    restart: str = ""
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        cells = (self.fault, self.clients, self.health, self.exit, self.restart)
        return "| " + " | ".join(cells) + " |"


class Scene:
    """One prepared model and the texts that an undisturbed server writes."""

    def __init__(self, folder: Path, keep: Path | None) -> None:
        self.folder, self.keep = folder, keep
        self.model = prepare(folder)
        self.prompts = read_prompts(CLIENTS)
        self.expected: dict[str, list[str]] = {}
        self.count = 0

    @contextmanager
    def serve(
        self,
        layout: Layout,
        cluster: RayCluster | None = None,
        timeout_s: float = 300,
        **env: str,
    ) -> Iterator[Server]:
        """A server on a cluster of its own, or on the one that is given."""
        self.count += 1
        options, environment = serve_options(layout)
        environment |= env
        with ExitStack() as stack:
            if layout.executor == "ray" and cluster is None:
                cluster = stack.enter_context(self.cluster(layout))
            if cluster is not None:
                environment |= cluster.environment()
            log = (self.keep or self.folder) / f"server{self.count}.log"
            argv = [BIN / "vllm", "serve", self.model, *options]
            process = ServerProcess(
                [str(a) for a in argv],
                log,
                env=environment,
                start_timeout_s=timeout_s,
            )
            stack.enter_context(process)
            yield Server(process, cluster, self.model)

    def cluster(self, layout: Layout, prepare_b: str = "true") -> RayCluster:
        folder = Path(tempfile.mkdtemp(prefix="ray-", dir=self.folder))
        devices = layout.tp * layout.pp // layout.nodes
        return RayCluster(folder, layout.nodes, devices, prepare_b)

    def learn(self, layout: Layout, server: Server) -> list[str]:
        """What the undisturbed server streams for each prompt."""
        if layout.name not in self.expected:
            clients = server.clients(self.prompts)
            for client in clients:
                assert client.thread is not None
                client.thread.join(300)
                if not client.end.startswith("finished"):
                    raise RuntimeError(f"undisturbed client: {client.end}")
            self.expected[layout.name] = [client.text for client in clients]
        return self.expected[layout.name]


def broken_while_streaming(
    scene: Scene, layout: Layout, name: str, break_it: Callable[[Server], None]
) -> Row:
    """Break a server under its clients; then a new server must serve as before."""
    row = Row(name)
    with ExitStack() as stack:
        cluster = None
        if layout.executor == "ray":
            cluster = stack.enter_context(scene.cluster(layout))
        with scene.serve(layout, cluster) as server:
            expected = scene.learn(layout, server)
            clients = server.clients(scene.prompts)
            wait_for(lambda: all(client.chunks >= 5 for client in clients), 60)
            broken = time.monotonic()
            break_it(server)
            row.health, row.exit = watch(server.process, broken)
            for client, whole in zip(clients, expected, strict=True):
                assert client.thread is not None
                client.thread.join(90)
                if client.thread.is_alive():
                    client.end = "still waiting after 90 s"
                    row.problems.append(f"{client.prompt!r}: hangs")
                if not whole.startswith(client.text):
                    row.problems.append(f"{client.prompt!r}: garbage {client.text!r}")
            ends = [client.end for client in clients]
            row.clients = "; ".join(
                f"{ends.count(end)} of {CLIENTS}: {end}" for end in dict.fromkeys(ends)
            )
        if cluster is not None and cluster.processes["node-b"].poll() is not None:
            cluster.stop()
            cluster = stack.enter_context(scene.cluster(layout))
        with scene.serve(layout, cluster) as server:
            scene.expected.pop(layout.name)
            same = scene.learn(layout, server) == expected
            row.restart = "serves, same text" if same else "serves, OTHER TEXT"
            if not same:
                row.problems.append("another text after the restart")
    return row


def watch(process: ServerProcess, since: float) -> tuple[str, str]:
    """How /health and the server's process go on, over at most 90 seconds."""
    answers: list[str] = []
    while time.monotonic() - since < 90:
        try:
            answer = str(httpx.get(f"{process.base_url}/health", timeout=5).status_code)
        except httpx.HTTPError as error:
            answer = "refused" if isinstance(error, httpx.ConnectError) else "no answer"
        if not answers or not answers[-1].startswith(answer):
            answers.append(f"{answer} at {time.monotonic() - since:.1f} s")
        status = process.status
        if status is not None:
            after = time.monotonic() - since
            return ", ".join(answers), f"status {status} after {after:.1f} s"
        time.sleep(0.2)
    return ", ".join(answers), "runs on"


def refused_at_start(
    scene: Scene,
    layout: Layout,
    name: str,
    must_say: list[str],
    prepare_b: str = "true",
    **env: str,
) -> Row:
    """A server that must end before it serves, with words that explain it."""
    row = Row(name, "no server", "refused", "", "")
    with ExitStack() as stack:
        cluster = None
        if layout.executor == "ray":
            cluster = stack.enter_context(scene.cluster(layout, prepare_b))
        started = time.monotonic()
        try:
            with scene.serve(layout, cluster, **env):
                row.problems.append("it served")
        except ServerError:
            row.exit = f"ends after {time.monotonic() - started:.0f} s"
            log = ((scene.keep or scene.folder) / f"server{scene.count}.log").read_text(
                errors="replace"
            )
            row.problems += [f"log lacks {w!r}" for w in must_say if w not in log]
            lines = [x for x in log.splitlines() if must_say and must_say[0] in x]
            row.restart = lines[-1][-300:] if lines else ""
    return row


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


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


MP = Layout("mp", 1, 2, 1)
RAY = Layout("ray", 2, 2, 1)


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
    words = ["the nodes of this server are not alike", "node-b (10.213.77.2) has none"]
    return refused_at_start(scene, RAY, "no artifact on node-b", words, hide)


def artifact_differs(scene: Scene) -> Row:
    other = scene.folder / "other"
    shutil.copytree(scene.model / "rsparse", other, dirs_exist_ok=True)
    tensors = other / "rsparse.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    mount = f"mount --bind {other} {scene.model}/rsparse"
    words = ["the nodes of this server are not alike", "node-b (10.213.77.2) has"]
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
    """Caches and temporary files have no room."""
    full = scene.folder / "full"
    full.mkdir()
    os.system(f"mount -t tmpfs -o size=64k none {full} && cat /dev/zero >{full}/x")
    places = ("TMPDIR", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")
    row = Row("disk full at start (mp, TP 2)", restart="-")
    try:
        with scene.serve(MP, None, **dict.fromkeys(places, str(full))) as server:
            answer = httpx.get(f"{server.process.base_url}/health").status_code
            row.health, row.exit = str(answer), "serves"
            texts = scene.expected.pop(MP.name, None)
            same = texts in (None, scene.learn(MP, server))
            row.clients = "same text" if same else "OTHER TEXT"
            row.problems += [] if same else ["another text"]
    except ServerError:
        row.exit = "ends before it serves"
    except RuntimeError as error:
        row.clients = str(error)
    finally:
        os.system(f"umount {full}")
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
    parser.add_argument("--keep", type=Path, help="folder for the servers' logs")
    arguments = parser.parse_args()
    keep = arguments.keep and arguments.keep.resolve()
    chosen = arguments.only.split(",")
    enter_namespaces()
    exit_on_signals()
    problems = []
    with tempfile.TemporaryDirectory(prefix="rs-", dir="/tmp") as temporary:
        os.chdir(temporary)  # Ray puts the driver's directory on its workers' sys.path
        scene = Scene(Path(temporary), keep)
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
