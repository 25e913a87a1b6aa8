# SPDX-License-Identifier: Apache-2.0
"""Gather text of this machine: tokens to train on, texts to calibrate and measure on.

    python benchmarks/small_model/text.py TEXT

Writes to the folder TEXT, 35 MB at most:

    train00.u16.xz ...    tokens to train on, uint16
    calibration-code.txt  calibration-english.txt
    heldout-code.txt      heldout-english.txt
    text.json             sizes, and the packages that each split was taken from

A package belongs to one split only. The bundled model's tokenizer is used.
"""

import argparse
import json
import lzma
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sources import Document, documents, python_roots
from tokenizers import Tokenizer

DOMAINS = ("code", "english")
MEASURED = ("calibration", "heldout")
TOKENIZER = Path(__file__).resolve().parents[2] / "tests/assets/pyllama-8m"
SPLIT_CHARACTERS = 700_000  # of each calibration and held-out text
SHARD_CHARACTERS = 8_000_000  # 1 to 1.5 MB, packed
# Positions in two-byte units, which the defaults (of bytes) pack 10% worse.
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1}]


def split(
    found: Iterable[Document], characters: int
) -> dict[tuple[str, str], list[Document]]:
    """Assign packages to splits, in the same way whatever the order of the files.

    Small packages, in an order that depends on the seed below only, fill calibration,
    then held-out text; all others are for training. A package above a fifth of
    ``characters`` is for training, so that at least five packages make a text.

    Args:
        found: documents of both domains.
        characters: wanted of each calibration and each held-out text.

    Returns:
        Documents by (split, domain), split being "train", "calibration" or "heldout".

    Raises:
        ValueError: a domain has too little text in small packages.
    """
    packages: dict[tuple[str, str], list[Document]] = {}
    for document in found:
        packages.setdefault((document.domain, document.group), []).append(document)
    result: dict[tuple[str, str], list[Document]] = {}
    for domain in DOMAINS:
        names = sorted(group for one, group in packages if one == domain)
        random.Random(0).shuffle(names)
        sizes = dict.fromkeys(MEASURED, 0)
        for name in names:
            members = packages[domain, name]
            size = _characters(members)
            short = [part for part in MEASURED if sizes[part] < characters]
            part = short[0] if short and size <= characters / 5 else "train"
            result.setdefault((part, domain), []).extend(members)
            if part in sizes:
                sizes[part] += size
        if min(sizes.values()) < characters:
            raise ValueError(
                f"not enough {domain} text: small packages have {sizes} of"
                f" {characters} characters each; install more, or give more folders"
                " with --python or --docs"
            )
    return result


def mixed(texts: Sequence[Sequence[str]]) -> Iterator[str]:
    """Draw from several lists, always from the one that has given the least so far."""
    left = [list(reversed(one)) for one in texts]
    given = [0] * len(left)
    while any(left):
        index = min((i for i, one in enumerate(left) if one), key=given.__getitem__)
        text = left[index].pop()
        given[index] += len(text)
        yield text


def pack(texts: Iterable[str], output: Path, room: int) -> int:
    """Write tokens in shards until the next would not fit in ``room`` bytes.

    Returns:
        Tokens written. Each document ends with the end-of-sequence token.
    """
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    end = json.loads((TOKENIZER / "config.json").read_text())["eos_token_id"]
    total = 0
    for index, shard in enumerate(_shards(texts, SHARD_CHARACTERS)):
        ids: list[int] = []
        for encoding in tokenizer.encode_batch(shard, add_special_tokens=False):
            ids += [*encoding.ids, end]
        packed = lzma.compress(np.array(ids, dtype="<u2").tobytes(), filters=XZ)
        if len(packed) > room:
            break
        room -= len(packed)
        total += len(ids)
        (output / f"train{index:02}.u16.xz").write_bytes(packed)
        print(f"shard {index}: {len(ids)} tokens, {len(packed)} bytes", flush=True)
    if not total:
        raise ValueError("not even one shard fits: raise --megabytes")
    return total


def _shards(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for text in texts:
        shard.append(text)
        size += len(text)
        if size >= characters:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def gather(
    python: Sequence[Path],
    docs: Sequence[Path],
    output: Path,
    megabytes: float,
    characters: int = SPLIT_CHARACTERS,
) -> None:
    """Write the folder that the other two steps read (see the top of this file).

    Raises:
        ValueError: too little text, or too little room for it.
        FileExistsError: ``output`` exists.
    """
    parts = split(documents(python, docs), characters)
    output.mkdir(parents=True)
    summary: dict[str, Any] = {"packages": {}, "characters": {}}
    rng = random.Random(0)
    room = int(1e6 * megabytes)
    train = []
    for (part, domain), members in sorted(parts.items()):
        name = f"{part}-{domain}"
        summary["characters"][name] = _characters(members)
        rng.shuffle(members)
        texts = [document.text for document in members]
        if part == "train":
            train.append(texts)
            continue
        summary["packages"][name] = sorted({document.group for document in members})
        file = output / f"{name}.txt"
        file.write_text("\n\n".join(texts), encoding="utf-8")
        room -= file.stat().st_size
    summary["train_tokens"] = pack(mixed(train), output, room - 100_000)
    (output / "text.json").write_text(json.dumps(summary, indent=1) + "\n")
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"{output}: {summary['train_tokens']} tokens to train on, {size} bytes")


def _characters(members: Iterable[Document]) -> int:
    return sum(len(document.text) for document in members)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", metavar="TEXT", type=Path, help="folder to make")
    parser.add_argument(
        "--python",
        type=Path,
        nargs="+",
        default=python_roots(),
        metavar="DIR",
        help="Python sources (default: those of the running Python)",
    )
    parser.add_argument(
        "--docs",
        type=Path,
        nargs="+",
        default=[Path("/usr/share/doc")],
        metavar="DIR",
        help="English documentation (default: %(default)s)",
    )
    parser.add_argument("--megabytes", type=float, default=35, help="at most")
    args = parser.parse_args()
    try:
        gather(args.python, args.docs, args.output, args.megabytes)
    except (ValueError, FileExistsError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
