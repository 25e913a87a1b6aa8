# SPDX-License-Identifier: Apache-2.0
"""``vllm-rsparse inspect``: show the contents of a prepared directory's artifact."""

import argparse
from pathlib import Path

from vllm_rsparse.arguments import check_picture, output_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "directory",
        metavar="DIR",
        type=Path,
        help="directory written by `prepare`, or the artifact inside it",
    )
    parser.add_argument(
        "--plot",
        type=output_file,
        metavar="OUT.png",
        help="draw sparsity by layer and kind as a heat map (needs matplotlib)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the tables, and draw the heat map if requested.

    Raises:
        ArtifactError: there is no artifact, or it is damaged.
        SettingError: --plot without matplotlib, or an image format that it cannot
            write.
    """
    if args.plot is not None:
        check_picture(args.plot)
    # torch takes seconds to import; bad options are refused before.
    from vllm_rsparse.artifact.inspect import describe, draw
    from vllm_rsparse.artifact.prepared import open_artifact

    artifact = open_artifact(args.directory)
    if args.plot is not None:
        draw(artifact.info, args.plot)
    print(describe(artifact.info))
    return 0
