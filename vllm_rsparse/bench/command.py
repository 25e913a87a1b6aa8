# SPDX-License-Identifier: Apache-2.0
"""``vllm-rsparse bench``: time of every distinct layer, dense and sparse."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

import torch

from vllm_rsparse import envs
from vllm_rsparse.arguments import output_problem, settle, writing
from vllm_rsparse.artifact.prepared import open_artifact
from vllm_rsparse.bench.bandwidth import read_bandwidth
from vllm_rsparse.bench.layers import SHAPES, Layer, layers_of
from vllm_rsparse.bench.measure import measure_layer
from vllm_rsparse.bench.provenance import device_name, provenance
from vllm_rsparse.bench.report import table
from vllm_rsparse.errors import SettingError
from vllm_rsparse.formats.int4 import INT4
from vllm_rsparse.formats.int8_planes import INT8_PLANES
from vllm_rsparse.formats.names import SERVED_FORMATS
from vllm_rsparse.formats.plane_bits import GROUPS
from vllm_rsparse.formats.registry import format_of_name
from vllm_rsparse.op import tables, tuning
from vllm_rsparse.op.backends import BACKENDS, Backend, resolve_backend
from vllm_rsparse.op.tuning import device_of

# Defaults of the options that not every run has a use for.
_OF_SHAPES = {"weights": ["float"], "sparsity": [0.5], "rho": 1.0}
_OF_GROUPS = {"group": 128}
_OF_DIRECTORY = {"tensor_parallel_size": 1}
_OF_TUNING = {"tune_routes": [tables.SPARSE], "tune_seconds": 25.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    what = parser.add_argument_group("what to measure: one of")
    what.add_argument(
        "directory",
        metavar="DIR",
        nargs="?",
        type=Path,
        help="prepared model whose layers to measure",
    )
    what.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        help="well-known models to measure by shape, without a checkpoint",
    )
    what.add_argument(
        "--n",
        nargs="+",
        type=int,
        metavar="N",
        help="a single linear by its output features, of each fused shard; with --k",
    )
    what.add_argument("--k", type=int, metavar="K", help="its input features")
    parser.add_argument(
        "--weights",
        nargs="+",
        choices=("bf16", *SERVED_FORMATS),
        help="without DIR: formats of the weights; float (also bf16) has that of"
        " --dtype (default: float)",
    )
    parser.add_argument(
        "--group",
        type=int,
        choices=(0, *GROUPS),
        help="with --weights int4 or int8-planes: input channels that share a scale;"
        " 0: all of them (default: 128)",
    )
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        default=[1, 2],
        metavar="M",
        help="tokens per call (default: 1 2)",
    )
    parser.add_argument(
        "--sparsity",
        nargs="+",
        type=float,
        metavar="S",
        help="without DIR: share of the bytes to skip; several are timed on the same"
        " weights (default: 0.5). In int8-planes a tenth of the kept channels are read"
        " with both planes",
    )
    parser.add_argument(
        "--rho",
        type=float,
        help="without DIR: share of the kept bytes for exact channels (default: 1)",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        "-tp",
        type=int,
        metavar="RANKS",
        help="with DIR: time a rank's part of each layer (default: 1)",
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16"],
        default="bfloat16",
        help="of x, and of float weights (default: bfloat16)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="OUT",
        help="write the rows to this file, as JSON; with --tune to bench.json in this"
        " folder, and the table next to it",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="search the launch configurations of these shapes for this GPU first, and"
        " write them to the folder of --output (default: the one that the engine"
        " reads, VLLM_RSPARSE_TUNING_DIR or ~/.cache/vllm_rsparse/tuning)",
    )
    parser.add_argument(
        "--tune-routes",
        nargs="+",
        choices=(tables.SPARSE, tables.DENSE),
        help="with --tune: the dense route is that of up to 64 tokens on quantized"
        " weights (default: sparse)",
    )
    parser.add_argument(
        "--tune-seconds",
        type=float,
        metavar="SECONDS",
        help="with --tune: how long to search, for each format (default: 25)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write the rows if requested."""
    measured = _layers(args)
    output = _output(args)
    dtype = getattr(torch, args.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = resolve_backend(envs.backend(), device, envs.BACKEND)
    if args.tune:
        _tune(args, [budgets[0] for budgets in measured], dtype, device)
    bandwidth = read_bandwidth(device)
    print(
        f"{device_name()}: backend {backend.label}, reads {bandwidth / 1e9:.0f} GB/s",
        file=sys.stderr,
    )
    rows = []
    for weights in dict.fromkeys(budgets[0].format for budgets in measured):
        of_format = [
            row
            for tokens in args.tokens
            for budgets in measured
            if budgets[0].format == weights
            for row in measure_layer(budgets, tokens, dtype, device, backend, bandwidth)
        ]
        print(table(of_format), flush=True)
        rows += of_format
    if output is not None:
        document = {**provenance(), "read_gbps": round(bandwidth / 1e9), "rows": rows}
        with writing(f"--output {output}"):
            output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _output(args: argparse.Namespace) -> Path | None:
    """The file for the rows, checked before any work is done.

    Raises:
        SettingError: it could not be written.
    """
    if args.output is None:
        return None
    file = args.output
    if args.tune:
        if file.exists() and not file.is_dir():
            raise SettingError(f"--output {file}: is a file; --tune writes a folder")
        with writing(f"--output {file}"):
            file.mkdir(parents=True, exist_ok=True)
        file = file / "bench.json"
    problem = output_problem(file)
    if problem is not None:
        raise SettingError(f"--output {file}: {problem}")
    return file


def _tune(
    args: argparse.Namespace, layers: list[Layer], dtype: torch.dtype, device: str
) -> None:
    """Search, write the table, and use it from here on.

    Raises:
        SettingError: there is no device to search for, or the table cannot be written.
    """
    refusal = BACKENDS[Backend.TRITON].refusal(device)
    if refusal is not None:
        raise SettingError(f"--tune needs a CUDA device: {refusal}")
    from vllm_rsparse.bench.tuner import OTHER_FOLDER, tune

    folder = args.output or tables.user_directory()
    with writing(folder, elsewhere=OTHER_FOLDER):
        folder.mkdir(parents=True, exist_ok=True)
    path = tables.table_path(folder, device_of(torch.device(device)).name)
    problem = output_problem(path)
    if problem is not None:
        raise SettingError(f"{path}: {problem}")
    formats = {layer.format for layer in layers}
    seconds = args.tune_seconds * len(formats)
    routes = dict.fromkeys(args.tune_routes)
    tune(layers, args.tokens, list(routes), dtype, device, path, seconds, provenance())
    print(f"wrote {path}", file=sys.stderr)
    if args.output is not None:
        print(
            f"the engine reads it with {envs.TUNING_DIR}={shlex.quote(str(folder))}",
            file=sys.stderr,
        )
    # What follows measures what was found.
    os.environ[envs.TUNING_DIR] = str(folder)
    tuning.forget_tables()


def _layers(args: argparse.Namespace) -> list[list[Layer]]:
    """Every layer to measure, with its budgets."""
    if min(args.tokens) < 1:
        raise SettingError(f"--tokens must be at least 1, got {min(args.tokens)}")
    given = [args.directory is not None, args.shapes is not None]
    given.append(args.n is not None or args.k is not None)
    if sum(given) != 1:
        raise SettingError(
            "give one of: a prepared directory, --shapes, or --n with --k"
        )
    _settle(args)
    if args.directory is not None:
        artifact = open_artifact(args.directory)
        return [
            [layer] for layer in layers_of(artifact.info, args.tensor_parallel_size)
        ]
    for sparsity in args.sparsity:
        if not 0.0 <= sparsity < 1.0:
            raise SettingError(f"--sparsity must lie in [0, 1), got {sparsity}")
    if not 0.0 < args.rho <= 1.0:
        raise SettingError(f"--rho must lie in (0, 1], got {args.rho}")
    if "bf16" in args.weights and args.dtype != "bfloat16":
        raise SettingError(f"--weights bf16 contradicts --dtype {args.dtype}")
    names = ["float" if name == "bf16" else name for name in args.weights]
    return [
        [layer.with_budget(sparsity, args.rho) for sparsity in args.sparsity]
        for name in dict.fromkeys(names)
        for layer in _distinct(args, name)
    ]


def _settle(args: argparse.Namespace) -> None:
    """Defaults of the options that were left out.

    Raises:
        SettingError: an option was given that this run would ignore, or is too small.
    """
    own = f"is for --shapes, or --n and --k: {args.directory} has its own"
    settle(args, _OF_SHAPES, args.directory is None, own)
    grouped = not {INT4.name, INT8_PLANES.name}.isdisjoint(args.weights)
    settle(args, _OF_GROUPS, grouped, "goes with --weights int4 or int8-planes")
    settle(args, _OF_DIRECTORY, args.directory is not None, "goes with a directory")
    settle(args, _OF_TUNING, args.tune, "goes with --tune")
    if args.tensor_parallel_size < 1:
        raise SettingError(
            "--tensor-parallel-size must be at least 1, got"
            f" {args.tensor_parallel_size}"
        )
    if not args.tune_seconds >= 0.0:
        raise SettingError(f"--tune-seconds must be >= 0, got {args.tune_seconds}")


def _distinct(args: argparse.Namespace, weight_format: str) -> list[Layer]:
    """The layers that were asked for, in a format, each once."""
    if args.shapes is not None:
        layers = [layer for name in args.shapes for layer in SHAPES[name]]
    else:
        if args.n is None or args.k is None or min(*args.n, args.k) < 1:
            raise SettingError(
                "--n and --k go together and must be at least 1, got"
                f" {_given('--n', args.n)} and {_given('--k', args.k)}"
            )
        layers = [Layer("linear", tuple(args.n), args.k)]
    stored = [layer.stored_as(weight_format, args.group) for layer in layers]
    for layer in stored:
        format_of_name(weight_format).check_shards(layer.shard_sizes)
    return list(dict.fromkeys(stored))


def _given(option: str, value: list[int] | int | None) -> str:
    """An option as it was given, for messages."""
    if value is None:
        return f"no {option}"
    values = value if isinstance(value, list) else [value]
    return " ".join([option, *map(str, values)])
