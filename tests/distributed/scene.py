# SPDX-License-Identifier: Apache-2.0
"""The ground of ``faults.py``: servers of one prepared model, what becomes of them."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from cluster import BIN, RayCluster
from stream_client import Client
from tokens import Layout, prepare, read_prompts, serve_options

from vllm_rsparse.testing.server import ServerError, ServerProcess

CLIENTS = 4


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
    """One prepared model and the texts that an undisturbed server writes.

    Args:
        folder: a place for the model and for clusters.
        keep: where the servers' logs go, ``folder`` if None.
        dense: the same servers with ``max_sparse_tokens`` 0, which is the base model.
    """

    def __init__(self, folder: Path, keep: Path | None, dense: bool = False) -> None:
        self.folder, self.keep, self.dense = folder, keep, dense
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
        options, environment = serve_options(layout, self.dense)
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
            judge(row, clients, expected)
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


def judge(row: Row, clients: list[Client], expected: list[str]) -> None:
    """How each client ended, and that what it got is a beginning of the right text."""
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
        f"{ends.count(end)} of {len(ends)}: {end}" for end in dict.fromkeys(ends)
    )


def watch(
    process: ServerProcess, since: float, at_most_s: float = 90
) -> tuple[str, str]:
    """How /health and the server's process go on."""
    answers: list[str] = []
    while time.monotonic() - since < at_most_s:
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
