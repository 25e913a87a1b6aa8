# SPDX-License-Identifier: Apache-2.0
"""``vllm-rsparse evaluate``: arguments in, table and JSON out."""

import argparse
import json
import logging
from pathlib import Path

from vllm_rsparse.arguments import check_picture, output_file, settle, writing
from vllm_rsparse.errors import SettingError

logger = logging.getLogger(__name__)

# Defaults of the options that one of --data and --chat would ignore.
_OF_DATA = {"window": 512, "dense_fraction": 0.1, "max_windows": None}
_OF_CHAT = {"answer_tokens": 256, "answers": None, "reference": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = "DIR comes first: --data and --compare take all words that follow."
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="directory written by `prepare`"
    )
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument(
        "--data",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="text files, or JSONL with `text` or `messages` (chats), not used"
        " for calibration",
    )
    texts.add_argument(
        "--chat",
        type=Path,
        metavar="FILE",
        help="prompts as JSON lines ('prompt' or 'messages', and 'domain'): measures"
        " the dense model's own greedy answers, prompt dense, answer sparse",
    )
    parser.add_argument(
        "--answer-tokens",
        type=int,
        metavar="N",
        help="with --chat: longest answer (default: 256)",
    )
    parser.add_argument(
        "--answers",
        type=output_file,
        metavar="FILE",
        help="with --chat: keep the answers in FILE, and take them from there if it"
        " exists",
    )
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="with --chat: whose answers and logits to compare with, such as the model"
        " that DIR's base was quantized from (default: DIR's base)",
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
        metavar="N",
        help="with --data: positions per window (default: 512)",
    )
    parser.add_argument(
        "--dense-fraction",
        type=float,
        metavar="F",
        help="with --data: leading part of each window that is not counted and runs"
        " dense, as the prompt does when served; with --engine vllm it runs sparse,"
        " uncounted (default: 0.1)",
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
        help="with --data: use N windows spread evenly over the text (default: all)",
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
    for defaults, applies, goes in (
        (_OF_DATA, args.chat is None, "goes with --data"),
        (_OF_CHAT, args.chat is not None, "goes with --chat"),
    ):
        settle(args, defaults, applies, goes)
    for name, value in (
        ("--window", args.window),
        ("--max-windows", args.max_windows),
        ("--answer-tokens", args.answer_tokens),
    ):
        if value is not None and value < 1:
            raise SettingError(f"{name} must be at least 1, got {value}")
    if args.plot is not None:
        check_picture(args.plot)
    if args.engine == "vllm" and args.device != "auto":
        raise SettingError(
            f"--device {args.device} goes with --engine torch; vLLM runs on the device"
            " that it was built for"
        )
    if args.chat is not None and (args.engine == "vllm" or args.plot is not None):
        raise SettingError("--chat goes with --engine torch and without --plot")
    # torch and transformers take seconds to import; bad options fail before that.
    from vllm_rsparse.artifact.prepared import PreparedDirectory
    from vllm_rsparse.evaluate.runs import run_chat, run_text

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
    on_disk = prepared[0].settings.weights_on_disk
    if on_disk is not None and args.reference is None:
        logger.warning(
            "%s holds its linears in %s (prepare --copy-weights): the dense model below"
            " has them too, and what they lose to the base model is not counted%s",
            args.directory,
            on_disk,
            "" if args.chat is None else "; --reference BASE counts it",
        )
    document = (run_text if args.chat is None else run_chat)(args, prepared)
    if args.json is not None:
        text = json.dumps(document, indent=1) + "\n"
        with writing(f"--json {args.json}"):
            args.json.write_text(text, encoding="utf-8")
    return 0
