# SPDX-License-Identifier: Apache-2.0
"""``vllm-rsparse evaluate``: arguments in, table and JSON out."""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_rsparse import __version__
from vllm_rsparse.arguments import check_picture, output_file
from vllm_rsparse.errors import SettingError
from vllm_rsparse.evaluate.plot import draw
from vllm_rsparse.text_table import align

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_rsparse.artifact.prepared import PreparedDirectory
    from vllm_rsparse.evaluate.measure import Loss

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="directory written by `prepare`"
    )
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="UTF-8 text that was not used for calibration",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="other preparations of the same base model, measured in the same run",
    )
    parser.add_argument(
        "--window",
        type=int,
        default=512,
        metavar="N",
        help="positions per window (default: %(default)s)",
    )
    parser.add_argument(
        "--dense-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="leading part of each window that is not counted and runs dense, as the"
        " prompt does when served; with --engine vllm it runs sparse, uncounted"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--engine",
        choices=("torch", "vllm"),
        default="torch",
        help="torch computes the formula in PyTorch; vllm runs the served kernels, each"
        " window as one eager step, dense in one engine and completely sparse in"
        " another, without the KL divergence (default: %(default)s)",
    )
    parser.add_argument(
        "--max-windows",
        type=int,
        metavar="N",
        help="use N windows spread evenly over the text (default: all)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run (default: cuda if available; --engine vllm runs on the"
        " device that vLLM was built for)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="compute dtype (default: float32 on CPU, bfloat16 on CUDA)",
    )
    parser.add_argument(
        "--json", type=output_file, metavar="OUT", help="write the figures as JSON"
    )
    parser.add_argument(
        "--plot",
        type=output_file,
        metavar="OUT.png",
        help="plot perplexity against bytes read, a line per recipe (needs matplotlib)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write JSON and a plot if requested.

    Raises:
        RSparseError: bad arguments, directories or text; the message says what to do.
    """
    for name, value in (("--window", args.window), ("--max-windows", args.max_windows)):
        if value is not None and value < 1:
            raise SettingError(f"{name} must be at least 1, got {value}")
    if args.plot is not None:
        check_picture(args.plot)
    if args.engine == "vllm" and args.device != "auto":
        raise SettingError(
            f"--device {args.device} goes with --engine torch; vLLM runs on the device"
            " that it was built for"
        )
    # torch and transformers take seconds to import; bad options fail before that.
    import torch

    from vllm_rsparse.artifact.prepared import PreparedDirectory
    from vllm_rsparse.evaluate.measure import dense_positions
    from vllm_rsparse.evaluate.windows import read_windows
    from vllm_rsparse.model.texts import load_tokenizer

    first = dense_positions(args.window, args.dense_fraction)
    prepared = [
        PreparedDirectory.open(path) for path in (args.directory, *args.compare)
    ]
    # The first too: a base that is gone is found here, before the tokenizer misses it.
    for other in prepared:
        if not prepared[0].same_base(other):
            raise SettingError(
                f"--compare {other.path}: its weights are not those of"
                f" {args.directory}; compare preparations of one base model"
            )
    tokenizer = load_tokenizer(args.directory)
    text = read_windows(tokenizer, args.data, args.window, args.max_windows)
    measure = _measure_vllm if args.engine == "vllm" else _measure_torch
    losses, ran = measure(args, prepared, text.windows, first)
    print(table(losses))
    if args.plot is not None:
        draw(losses, [one.recipe for one in prepared], args.plot)
    if args.json is not None:
        document: dict[str, Any] = {
            "results": [asdict(loss) for loss in losses],
            "protocol": {
                "engine": args.engine,
                "window": args.window,
                "windows": len(text.windows),
                "windows_available": text.available,
                "uncounted_positions": first,
                "dense_positions": first if args.engine == "torch" else 0,
                "device": ran.device,
                "dtype": ran.dtype,
            },
            "data": text.files,
            "versions": {
                "vllm_rsparse": __version__,
                "torch": torch.__version__,
                "transformers": version("transformers"),
                **ran.versions,
            },
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


@dataclass(frozen=True)
class _Ran:
    """What the figures were computed on."""

    device: str
    dtype: str
    versions: dict[str, str] = field(default_factory=dict)


def _measure_torch(
    args: argparse.Namespace,
    prepared: "Sequence[PreparedDirectory]",
    windows: "Tensor",
    first: int,
) -> "tuple[list[Loss], _Ran]":
    import torch

    from vllm_rsparse.evaluate.loading import SwitchableModel
    from vllm_rsparse.evaluate.measure import measure
    from vllm_rsparse.model.device import choose_device

    device = choose_device(args.device)
    dtype = args.dtype
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    model = SwitchableModel(prepared[0], device, getattr(torch, dtype))
    model.check_window(args.window)
    return measure(model, prepared, windows, first), _Ran(device.type, dtype)


def _measure_vllm(
    args: argparse.Namespace,
    prepared: "Sequence[PreparedDirectory]",
    windows: "Tensor",
    first: int,
) -> "tuple[list[Loss], _Ran]":
    from vllm_rsparse.evaluate.engine import check_engine, measure_served

    check_engine(prepared[0], args.window)
    losses, run = measure_served(prepared, windows, first, args.dtype)
    return losses, _Ran(run.device, run.dtype, {"vllm": run.vllm})


def table(losses: Sequence["Loss"]) -> str:
    """One column per artifact, one row per figure."""
    head = losses[0]
    rows: list[list[str]] = [
        ["", *(Path(loss.directory).name for loss in losses)],
        ["perplexity, dense", *(f"{x.perplexity_dense:.3f}" for x in losses)],
        ["perplexity, sparse", *(f"{x.perplexity_sparse:.3f}" for x in losses)],
        ["ratio", *(f"{x.ratio:.3f}" for x in losses)],
        ["KL(dense || sparse), nats", *(_optional(x.kl_divergence, 4) for x in losses)],
        ["top-1 agreement", *(f"{x.top1_agreement:.3f}" for x in losses)],
        ["target sparsity", *(f"{x.target_sparsity:.3f}" for x in losses)],
        ["achieved sparsity", *(f"{x.achieved_sparsity:.3f}" for x in losses)],
    ]
    for kind in head.by_kind:
        shown = (x.by_kind.get(kind) for x in losses)
        rows.append([f"  {kind}", *(_optional(s, 3) for s in shown)])
    rows.append(["tokens counted", *(str(x.tokens) for x in losses)])
    return align(rows)


def _optional(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
