# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens over tensor and pipeline parallel sizes, executors and nodes.

    python tests/distributed/tokens.py [--only NAME,...] [--prompts 50] [--json FILE]
                                       [--recipe best] [--dense] [--keep FOLDER]

The bundled model, prepared at 50% with factors and served in float32 by ``vllm serve``,
answers the same prompts in every layout; the first layout is what the others are
compared with. Its six heads do not divide by four: it gets two more whose weights are
zero, which is the same function. Exit status 1 when fewer than 75% of the prompts get
equal tokens, 77 where namespaces cannot be made.

Where there are GPUs, the layouts of one node that fit them run on those, and Ray is the
cluster that vLLM starts by itself.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cluster import BIN, RayCluster, enter_namespaces
from openai import OpenAI
from safetensors.torch import load_file, save_file

from vllm_rsparse.testing.server import ServerProcess, exit_on_signals

MODEL = Path(__file__).resolve().parents[1] / "assets/pyllama-8m"
NEW_TOKENS = 24
ON_GPU = torch.cuda.is_available()
# Ranks add their parts of a sum in another order, compiled code in another than eager.
# That moves x by 1e-7, a channel near its threshold falls on the other side, and what
# follows sees another mask. 3 of 50 prompts turned; a wrong slice turns them all.
LEAST_EQUAL = 0.75


@dataclass(frozen=True)
class Layout:
    """How one server is spread: its executor, nodes, and parallel sizes."""

    executor: str
    nodes: int
    tp: int
    pp: int
    compiled: bool = False
    backend: str = "auto"

    @property
    def name(self) -> str:
        name = f"{self.executor}{self.nodes}-tp{self.tp}-pp{self.pp}"
        name += "-compiled" if self.compiled and self.pp == 1 else ""
        return name + (f"-{self.backend}" if self.backend != "auto" else "")


ALL_LAYOUTS = [
    Layout("mp", 1, 1, 1),
    # Controls: one rank that only adds in another order.
    Layout("mp", 1, 1, 1, compiled=True),
    Layout("mp", 1, 1, 1, backend="reference"),
    Layout("mp", 1, 2, 1),
    Layout("mp", 1, 4, 1),
    Layout("mp", 1, 1, 2, compiled=True),
    Layout("ray", 1, 2, 1),
    Layout("ray", 1, 4, 1),
    Layout("ray", 1, 1, 2, compiled=True),
    Layout("ray", 2, 2, 1),
    Layout("ray", 2, 4, 1),
    Layout("ray", 2, 1, 2, compiled=True),
    Layout("ray", 2, 2, 2, compiled=True),
]
LAYOUTS = [
    layout
    for layout in ALL_LAYOUTS
    if not ON_GPU
    or (layout.nodes == 1 and layout.tp * layout.pp <= torch.cuda.device_count())
]


def prepare(folder: Path, recipe: str = "uniform") -> Path:
    """The bundled model with eight heads, prepared: a directory to serve."""
    base, output = folder / "eight-heads", folder / "prepared"
    base.mkdir()
    for file in MODEL.glob("*.json"):
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((MODEL / "config.json").read_text())
    head, heads, kv = config["head_dim"], 8, config["num_key_value_heads"]
    config["num_attention_heads"] = heads
    (base / "config.json").write_text(json.dumps(config))
    weights = load_file(MODEL / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("q_proj.weight"):
            groups = weight.view(kv, -1, head, weight.shape[1])
            more = groups.new_zeros(
                kv, heads // kv - groups.shape[1], *groups.shape[2:]
            )
            weights[name] = torch.cat([groups, more], 1).reshape(heads * head, -1)
        elif name.endswith("o_proj.weight"):
            groups = weight.view(weight.shape[0], kv, -1, head)
            missing = heads // kv - groups.shape[2]
            more = groups.new_zeros(weight.shape[0], kv, missing, head)
            weights[name] = torch.cat([groups, more], 2).reshape(-1, heads * head)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    texts = [
        Path(sysconfig.get_path("stdlib")) / f"{n}.py" for n in ("argparse", "typing")
    ]
    command = [BIN / "vllm-rsparse", "prepare", base, output, "--sparsity", "0.5"]
    command += ["--recipe", recipe, "--rho", "0.9"]
    command += ["--calibration-samples", "4", "--calibration-tokens", "512"]
    command += ["--calibration-data", *texts]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return output


def read_prompts(count: int) -> list[str]:
    """Beginnings of definitions in files of the standard library."""
    prompts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        text = path.read_text(errors="replace")
        start = text.find("\ndef ")
        if start > 0:
            prompts.append(text[start : start + 60])
    step = len(prompts) / count
    return [prompts[int(index * step)] for index in range(count)]


def serve_options(
    layout: Layout, dense: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of ``vllm serve`` for this layout."""
    options = ["--tensor-parallel-size", str(layout.tp)]
    options += ["--pipeline-parallel-size", str(layout.pp)]
    options += ["--distributed-executor-backend", layout.executor]
    # With one request at a time and everything sparse, no route depends on the batch.
    options += ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8"]
    options += ["--no-enable-prefix-caching"]
    if not layout.compiled:
        # Quicker to start. vLLM 0.32 on CPU has no eager mode with stages.
        options += ["--enforce-eager"]
    env = {
        "VLLM_RSPARSE_MAX_SPARSE_TOKENS": "0" if dense else "100000",
        "VLLM_RSPARSE_BACKEND": layout.backend,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return options, env


@dataclass
class Answer:
    """Token ids of one completion and, for each, the gap to the second best token."""

    tokens: list[int]
    gaps: list[float]


def ask(server: ServerProcess, model: str, prompt: str) -> Answer:
    client = OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
    choice = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=NEW_TOKENS,
        temperature=0,
        logprobs=2,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    ).choices[0]
    best = [sorted(step.values()) for step in choice.logprobs.top_logprobs]
    return Answer(choice.token_ids, [step[-1] - step[-2] for step in best])


def run(
    layout: Layout,
    model: Path,
    prompts: list[str],
    folder: Path,
    log: Path,
    dense: bool,
) -> list[Answer]:
    """Start the layout's cluster and server, ask everything, stop both."""
    options, env = serve_options(layout, dense)
    with ExitStack() as stack:
        if layout.executor == "ray" and not ON_GPU:
            folder.mkdir()
            devices = layout.tp * layout.pp // layout.nodes
            cluster = RayCluster(folder, layout.nodes, devices)
            env |= stack.enter_context(cluster).environment()
        argv = [BIN / "vllm", "serve", model, "--quantization", "rsparse", *options]
        server = ServerProcess([str(a) for a in argv], log, env=env)
        stack.enter_context(server)
        return [ask(server, str(model), prompt) for prompt in prompts]


def compare(answers: list[Answer], first: list[Answer]) -> tuple[int, list[float]]:
    """How many are equal; for each other, the first layout's gap where they part."""
    gaps = []
    for mine, reference in zip(answers, first, strict=True):
        pairs = enumerate(zip(mine.tokens, reference.tokens, strict=True))
        parting = next((i for i, (a, b) in pairs if a != b), None)
        if parting is not None:
            gaps.append(reference.gaps[parting])
    return len(answers) - len(gaps), gaps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ",".join(layout.name for layout in LAYOUTS)
    parser.add_argument("--only", default=names, help=f"layouts; default {names}")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--recipe", default="uniform", help="default %(default)s")
    parser.add_argument("--dense", action="store_true", help="max_sparse_tokens 0")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--keep", type=Path, help="folder for the servers' logs")
    arguments = parser.parse_args()
    json_path = arguments.json and arguments.json.resolve()
    keep = arguments.keep and arguments.keep.resolve()
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    chosen = arguments.only.split(",")
    unknown = set(chosen) - {layout.name for layout in LAYOUTS}
    if unknown:
        parser.error(f"--only: no layout {', '.join(unknown)}; see --help")
    if not ON_GPU:
        enter_namespaces()
    exit_on_signals()
    prompts = read_prompts(arguments.prompts)
    rows, failed = [], False
    with tempfile.TemporaryDirectory(prefix="rs-", dir="/tmp") as temporary:
        folder = Path(temporary)
        os.chdir(folder)  # Ray puts the driver's directory on its workers' sys.path
        model = prepare(folder, arguments.recipe)
        first: list[Answer] | None = None
        print("| layout | equal | gaps where not | seconds |")
        print("|---|---|---|---|", flush=True)
        for layout in [item for item in LAYOUTS if item.name in chosen]:
            started = time.monotonic()
            log = (keep or folder) / f"{layout.name}.log"
            place = folder / layout.name
            answers = run(layout, model, prompts, place, log, arguments.dense)
            first = first or answers
            equal, gaps = compare(answers, first)
            failed |= equal < LEAST_EQUAL * len(prompts)
            seconds = time.monotonic() - started
            rows.append({**asdict(layout), "equal": equal, "gaps": gaps})
            shown = ", ".join(f"{gap:.4f}" for gap in gaps) or "-"
            print(
                f"| {layout.name} | {equal} of {len(prompts)} | {shown} |"
                f" {seconds:.0f} |",
                flush=True,
            )
    if json_path:
        json_path.write_text(json.dumps(rows, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
