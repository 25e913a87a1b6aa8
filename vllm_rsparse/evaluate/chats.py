# SPDX-License-Identifier: Apache-2.0
"""The dense model's own greedy answers to prompts of several domains.

What a user loses is what the answers lose: the prompt runs dense and the answer sparse,
and the dense model's answer is fed to both, so that every token of it is compared.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from pydantic import StrictInt, StrictStr
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from vllm_rsparse.arguments import writing
from vllm_rsparse.errors import SettingError
from vllm_rsparse.evaluate.loading import SwitchableModel
from vllm_rsparse.evaluate.measure import Passage
from vllm_rsparse.texts.prompts import Prompt
from vllm_rsparse.validation import CONFIG, read_json, validate

logger = logging.getLogger(__name__)

# Prompts that are answered together on CUDA; on a CPU one by one.
AT_ONCE = 32
# An answer needs a sparse token and one that it predicts.
SHORTEST = 2
_OTHER_FILE = "; remove it, or give another file"


@dataclass(frozen=True, config=CONFIG)
class Answer:
    """A prompt with the dense model's answer.

    Attributes:
        domain: of the prompt.
        prompt: its tokens.
        answer: tokens, with the one that ends it if it was reached.
    """

    domain: StrictStr
    prompt: list[StrictInt]
    answer: list[StrictInt]

    @property
    def passage(self) -> Passage:
        """The prompt dense, the answer counted."""
        return Passage(torch.tensor(self.prompt + self.answer), len(self.prompt))


@dataclass(frozen=True, config=CONFIG)
class _Kept:
    """The file of kept answers.

    Attributes:
        asked: digest of what the answers depend on.
        answers: to the prompts, in their order.
    """

    asked: StrictStr
    answers: list[Answer]


def answers_of(
    model: SwitchableModel, prompts: Sequence[Prompt], tokens: int, file: Path | None
) -> list[Answer]:
    """The dense model's greedy answers; those too short to count are left out.

    Args:
        model: answers densely.
        prompts: what to answer.
        tokens: longest answer.
        file: keeps the answers: read if it exists, else written. None keeps nothing.

    Raises:
        SettingError: the file has answers of another model or to other prompts, or a
            prompt leaves no room for an answer.
    """
    asked = _digest(model, prompts, tokens)
    if file is not None and file.exists():
        answers = _read(file, asked)
    else:
        answers = _generate(model, prompts, tokens)
        if file is not None:
            document = {"asked": asked, "answers": [asdict(one) for one in answers]}
            with writing(f"--answers {file}"):
                file.write_text(json.dumps(document) + "\n", encoding="utf-8")
    long = [one for one in answers if len(one.answer) >= SHORTEST]
    if len(long) < len(answers):
        logger.warning(
            "%d of %d answers have fewer than %d tokens and are left out",
            len(answers) - len(long),
            len(answers),
            SHORTEST,
        )
    if not long:
        raise SettingError(
            f"--chat: no answer has {SHORTEST} tokens; give other prompts, or a larger"
            " --answer-tokens"
        )
    return long


def _read(file: Path, asked: str) -> list[Answer]:
    document = read_json(file, SettingError, _OTHER_FILE, f"--answers {file}")
    if document.get("asked") != asked:
        raise SettingError(
            f"--answers {file}: holds the answers of another model, to other prompts or"
            f" of another length{_OTHER_FILE}"
        )
    name = f"--answers {file}"
    return validate(_Kept, document, name, SettingError, _OTHER_FILE).answers


def _digest(model: SwitchableModel, prompts: Sequence[Prompt], tokens: int) -> str:
    """What the answers depend on: the model's config and size, prompts, length."""
    config = (model.directory / "config.json").read_bytes()
    sizes = sorted(
        file.stat().st_size for file in model.directory.glob("*.safetensors")
    )
    asked = [hashlib.sha256(config).hexdigest(), sizes, tokens]
    document = json.dumps([asked, [asdict(prompt) for prompt in prompts]])
    return hashlib.sha256(document.encode()).hexdigest()


def _generate(
    model: SwitchableModel, prompts: Sequence[Prompt], tokens: int
) -> list[Answer]:
    if model.longest:
        longest = max(len(prompt.ids) for prompt in prompts)
        if longest + SHORTEST > model.longest:
            raise SettingError(
                f"--chat: a prompt has {longest} tokens, which leaves no room for an"
                f" answer in the model's length of {model.longest}"
            )
        tokens = min(tokens, model.longest - longest)
    at_once = AT_ONCE if model.device.type == "cuda" else 1
    # Of about the same length together: the shorter ones are padded.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    found: dict[int, list[int]] = {}
    with tqdm(total=len(prompts), desc="answers", unit="prompt") as progress:
        for start in range(0, len(order), at_once):
            part = order[start : start + at_once]
            replies = model.answer([prompts[i].ids for i in part], tokens)
            found |= dict(zip(part, replies, strict=True))
            progress.update(len(part))
    return [
        Answer(prompt.domain, prompt.ids, found[i]) for i, prompt in enumerate(prompts)
    ]


def by_domain(answers: Iterable[Answer]) -> dict[str, list[Passage]]:
    """Passages of each domain, shorter answers first so that they run together."""
    domains: dict[str, list[Passage]] = {}
    for one in answers:
        domains.setdefault(one.domain, []).append(one.passage)
    for passages in domains.values():
        passages.sort(key=lambda passage: len(passage.ids))
    return domains
