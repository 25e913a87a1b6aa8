# SPDX-License-Identifier: Apache-2.0
"""Make a local task for lm-eval from any text: which of four lines comes next?

    python benchmarks/next_line.py OUT TEXT... --questions 400

writes ``OUT/next_line.jsonl`` and ``OUT/next_line.yaml``; docs/evaluation.md runs them.
The wrong lines come from near the right one and have its indentation and about its
length, so that only the context distinguishes them. The same texts, number and seed
give the same questions.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONTEXT_LINES = 24
CONTEXT_CHARACTERS = 1200
NEAR = 200  # lines either way that wrong answers come from
SHORTEST = 12  # characters of an answer, without its indentation
WRONG = 3
ALIKE = 8  # of the lines near, those nearest in length

TASK = """\
task: next_line
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: "\\n"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def questions(text: str, generator: random.Random) -> Iterator[dict[str, Any]]:
    """Questions on one text in random order: context, choices, index of the answer."""
    lines = text.splitlines()
    order = list(range(CONTEXT_LINES, len(lines)))
    generator.shuffle(order)
    for at in order:
        right = lines[at]
        context = "\n".join(lines[at - CONTEXT_LINES : at])[-CONTEXT_CHARACTERS:]
        if len(right.strip()) < SHORTEST or not context.strip():
            continue
        near = lines[max(0, at - NEAR) : at + NEAR]
        others = {line.rstrip() for line in near if len(line.strip()) >= SHORTEST}
        others = {line for line in others if _indentation(line) == _indentation(right)}
        length = len(right.rstrip())
        # By the text too, for the order of a set differs from run to run.
        wrong = sorted(
            others - {right.rstrip()}, key=lambda line: (abs(len(line) - length), line)
        )
        if len(wrong) < WRONG:
            continue
        choices = [right.rstrip(), *generator.sample(wrong[:ALIKE], WRONG)]
        generator.shuffle(choices)
        yield {
            # No white space at the end: lm-eval would move it to the answers.
            "context": context.rstrip(),
            "choices": choices,
            "answer": choices.index(right.rstrip()),
        }


def _indentation(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def write_task(
    directory: Path, texts: list[Path], number: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Write the task's two files with equally many questions per text; returns them.

    Raises:
        ValueError: the texts do not yield enough questions.
    """
    generator = random.Random(seed)
    rows = []
    for i, path in enumerate(texts):
        wanted = (number - len(rows)) // (len(texts) - i)
        of_text = questions(path.read_text(encoding="utf-8"), generator)
        rows += [row for _, row in zip(range(wanted), of_text, strict=False)]
    if len(rows) < number:
        raise ValueError(
            f"{', '.join(map(str, texts))}: give {len(rows)} questions, {number} were"
            " asked for; add texts or lower --questions"
        )
    directory.mkdir(parents=True, exist_ok=True)
    data = directory.absolute() / "next_line.jsonl"
    with data.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    (directory / "next_line.yaml").write_text(TASK.format(data=json.dumps(str(data))))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        write_task(args.out, args.texts, args.questions, args.seed)
    except (OSError, ValueError) as error:
        print(f"next_line.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
