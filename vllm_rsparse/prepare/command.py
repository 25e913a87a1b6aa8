# SPDX-License-Identifier: Apache-2.0
"""``vllm-rsparse prepare``: arguments in, table out."""

import argparse
import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_rsparse.prepare.options import (
    DEFAULT_TOKENS,
    DEVICES,
    DTYPES,
    HEADS,
    WEIGHTS,
    PrepareOptions,
)
from vllm_rsparse.prepare.recipe.recipes import RECIPES
from vllm_rsparse.texts.documents import TextFile

if TYPE_CHECKING:
    from vllm_rsparse.artifact.schema import ArtifactInfo

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; their defaults are those of ``PrepareOptions``."""
    parser.epilog = (
        "MODEL and OUTPUT come first: --sparsity and --calibration-data take all words"
        " that follow."
    )
    parser.add_argument(
        "model", metavar="MODEL", help="base model: local directory or Hub name"
    )
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        type=Path,
        help="directory to write, which vllm serve loads",
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--sparsity",
        type=_sparsity,
        nargs="+",
        metavar="S",
        help="fraction of the linears' bytes that decoding skips, for example 0.5;"
        " several write the directories OUTPUT-S in one run",
    )
    target.add_argument(
        "--bits",
        type=float,
        metavar="B",
        help="with --weights int8-planes: mean bits of a weight that decoding reads,"
        " for example 4.2",
    )
    target.add_argument(
        "--max-kl",
        type=float,
        metavar="KL",
        help="find the largest sparsity whose KL divergence from the dense model on"
        " held-out answers is at most this, for example 0.02 nats",
    )
    parser.add_argument(
        "--calibration-data",
        nargs="+",
        default=(),
        metavar="FILE[=WEIGHT]",
        help="text files, or JSONL with `text` or `messages` (chats), similar to"
        " what the model will read and write; chat.jsonl=2 code.txt=1 takes two thirds"
        " of the windows from the first (default: the model writes its own text)",
    )
    parser.add_argument(
        "--recipe",
        default=PrepareOptions.recipe,
        metavar="NAME|FILE",
        help=f"how the sparsity is allocated: {', '.join(RECIPES)}, or a JSON file;"
        " docs/accuracy.md compares them (default: %(default)s)",
    )
    parser.add_argument(
        "--save-recipe",
        type=Path,
        metavar="FILE",
        help="write what every linear got, for --recipe FILE",
    )
    parser.add_argument(
        "--rho",
        type=float,
        default=PrepareOptions.rho,
        help="share of the kept bytes for exact channels; the rest goes to low-rank"
        " factors; 1: no factors (default: the recipe's own, 0.95 for uniform, else 1)",
    )
    parser.add_argument(
        "--calibration-samples",
        type=int,
        default=PrepareOptions.samples,
        metavar="N",
        help="windows of text (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        default=PrepareOptions.tokens,
        metavar="N",
        help=f"tokens per window (default: {DEFAULT_TOKENS}, or the model's length if"
        " that is shorter; of text that the model writes itself 2048 on CUDA, 512 on a"
        " CPU)",
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default=PrepareOptions.device,
        help="where to calibrate (default: cuda if available)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=PrepareOptions.dtype,
        help="compute dtype of calibration (default: float32 on CPU, the checkpoint's"
        " on CUDA)",
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default=PrepareOptions.weights,
        help="what the linears' weights are quantized to while they load, for"
        " calibration and when served; the checkpoint on disk stays as it is (default:"
        " %(default)s)",
    )
    parser.add_argument(
        "--head",
        choices=HEADS,
        default=PrepareOptions.head,
        help="what the output layer (lm_head) is quantized to, for calibration and when"
        " served; a tied embedding stays as it is, and the output layer becomes a copy"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--head-sparsity",
        type=float,
        default=PrepareOptions.head_sparsity,
        metavar="S",
        help="fraction of the output layer's bytes that decoding skips, for example 0.3"
        " (default: 0, dense)",
    )
    parser.add_argument(
        "--copy-weights",
        action="store_true",
        help="copy the base's files instead of linking to them; with --weights, the"
        " linears are written in that format, and nothing needs the base any more",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=PrepareOptions.seed,
        help="selects the calibration windows (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an OUTPUT that an earlier run wrote",
    )
    parser.add_argument(
        "--revision", help="branch, tag or commit of a Hub model (default: main)"
    )


def _sparsity(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"numbers follow, got {text!r}; put MODEL and OUTPUT before it"
        ) from None


def run(args: argparse.Namespace) -> int:
    """Prepare, then print the table and the command that serves the result."""
    options = PrepareOptions(
        model=args.model,
        output=args.output,
        sparsity=None if args.sparsity is None else tuple(args.sparsity),
        bits=args.bits,
        max_kl=args.max_kl,
        calibration_data=tuple(map(TextFile.parse, args.calibration_data)),
        rho=args.rho,
        recipe=args.recipe,
        save_recipe=args.save_recipe,
        samples=args.calibration_samples,
        tokens=args.calibration_tokens,
        device=args.device,
        dtype=args.dtype,
        weights=args.weights,
        head=args.head,
        head_sparsity=args.head_sparsity,
        copy_weights=args.copy_weights,
        seed=args.seed,
        overwrite=args.overwrite,
        revision=args.revision,
    )
    # torch and transformers take seconds to import; bad options are refused before.
    from vllm_rsparse.prepare.pipeline import prepare_all

    infos = prepare_all(options)
    for output, info in zip(options.outputs, infos, strict=True):
        _report(options, output, info)
    return 0


def _report(options: PrepareOptions, output: Path, info: "ArtifactInfo") -> None:
    """Say what was written, and how it is served."""
    from vllm_rsparse.artifact.card import card_line
    from vllm_rsparse.prepare.report import summary

    print(summary(info))
    if info.bits_read is not None and options.bits is not None:
        logger.info(
            "%.2f bits read of a weight (target %.2f), scales included",
            info.bits_read,
            options.bits,
        )
    logger.info(
        "achieved sparsity %.3f (target %.3f), factors counted, on the calibration"
        " text; written to %s",
        info.achieved_sparsity,
        info.sparsity,
        output,
    )
    print(f"model card: {card_line(info)}")
    serve = ["vllm", "serve", str(output), "--quantization", "rsparse"]
    print(f"serve it with: {shlex.join(serve)}")
