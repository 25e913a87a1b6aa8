# SPDX-License-Identifier: Apache-2.0
"""The ``vllm-rsparse`` command: a table of subcommands, argparse only.

Each subcommand is the module ``command`` of its package, with ``add_arguments(parser)``
and ``run(args) -> int``, imported only if it is requested: ``--help`` needs neither
torch nor vLLM.
"""

import argparse
import importlib
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from vllm_rsparse import __version__
from vllm_rsparse.arguments import Once
from vllm_rsparse.errors import RSparseError

# Subcommand -> module, one line of help.
COMMANDS = {
    "prepare": (
        "vllm_rsparse.prepare.command",
        "make a sparse model from a base model",
    ),
    "evaluate": (
        "vllm_rsparse.evaluate.command",
        "measure how much accuracy a prepared model loses",
    ),
    "bench": (
        "vllm_rsparse.bench.command",
        "measure the speed of the kernels on this device",
    ),
    "inspect": (
        "vllm_rsparse.artifact.command",
        "show the contents of a prepared model",
    ),
    "doctor": (
        "vllm_rsparse.doctor.command",
        "check the installation and a prepared model",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: arguments without the program's name; None takes ``sys.argv``.

    Returns:
        Exit status: 0, or 1 after an error that was printed, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="vllm-rsparse", description="R-Sparse activation sparsity for vLLM."
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # Options before the subcommand have no values: the first other word names it.
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    for name, (module, help_text) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=help_text, description=help_text[0].upper() + help_text[1:] + "."
        )
        if name == chosen:
            subparser.register("action", None, Once)
            importlib.import_module(module).add_arguments(subparser)
    args = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr
    )
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    command = importlib.import_module(COMMANDS[args.command][0])
    name = f"vllm-rsparse {args.command}"
    with _ended_by_signals() as received:
        try:
            return command.run(args)
        # A library may have replaced what the handler raised by an error of its own.
        except BaseException as error:
            if received or isinstance(error, KeyboardInterrupt):
                print(f"{name}: interrupted", file=sys.stderr)
                return 128 + (received or [signal.SIGINT])[0]
            # What the user can put right; everything else is a bug and shows its
            # traceback. An OSError without a number is no failed system call, but
            # raised by some library.
            ours = isinstance(error, RSparseError) or (
                isinstance(error, OSError) and error.errno is not None
            )
            if args.debug or not ours:
                raise
            print(f"{name}: error: {error}", file=sys.stderr)
            return 1


@contextmanager
def _ended_by_signals() -> Iterator[list[int]]:
    """Clean up after ``kill`` in the same way as after Ctrl-C.

    Yields:
        The signals received so far. Each raised an exception in the main thread.
    """
    received: list[int] = []

    def end(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        raise KeyboardInterrupt

    both = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in both}
    # A shell lets its background jobs ignore Ctrl-C.
    ignored = (signal.SIG_IGN, None)
    heeded = [n for n, handler in previous.items() if handler not in ignored]
    for number in heeded:
        signal.signal(number, end)
    try:
        yield received
    finally:
        for number in heeded:
            signal.signal(number, previous[number])


if __name__ == "__main__":
    sys.exit(main())
