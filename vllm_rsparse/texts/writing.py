# SPDX-License-Identifier: Apache-2.0
"""Calibration text that the model writes itself.

Seed prompts of several domains ship with the package (``seeds.jsonl``). A model with a
chat template answers those with ``prompt``; any other model continues those with
``start``. Answers are sampled, so that a second round over the seeds gives other text.
"""

import hashlib
import json
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.loading import load_model, loaded_bytes
from vllm_rsparse.model.memory import free_memory, release_freed_memory
from vllm_rsparse.text_table import size_of
from vllm_rsparse.texts.documents import Document, Source
from vllm_rsparse.texts.prompts import prompt_ids
from vllm_rsparse.texts.seeds import seed_prompts, seeds_digest
from vllm_rsparse.texts.tokens import DocumentTokens, load_tokenizer

logger = logging.getLogger(__name__)

SAMPLING: Mapping[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 50}
# Rounds over the seeds, after which a model that writes next to nothing is given up.
ROUNDS = 8
_GIVE_TEXT = "give text with --calibration-data"


@dataclass(frozen=True)
class Pace:
    """How much is written on a type of device.

    Attributes:
        batch: answers sampled together; the weights are read once for all of them.
        answer: longest answer, in tokens.
        window: tokens of a calibration window, unless the user sets them.
    """

    batch: int
    answer: int
    window: int


# A core of an AMD EPYC, shared with other work, samples 105 tokens/s of a model of 135M
# parameters in bfloat16: 16 windows of 512 tokens take about a minute on two cores. On
# a CPU a larger batch gains little, and more short answers cover the domains better
# than a few long ones.
PACES = {"cpu": Pace(32, 128, 512), "cuda": Pace(128, 256, 2048)}


def write_calibration(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    seed: int = 0,
) -> list[Document]:
    """Let a model write documents.

    Args:
        checkpoint: of the model, quantized or not.
        device: where to run it; all of it must fit in memory there.
        dtype: to run it in, for example that of ``writing_dtype``.
        tokens: number to write at least, the prompts' included.
        seed: of the sampling. The result is the same on the same machine.

    Raises:
        CheckpointError: the model does not fit or cannot be loaded, or it writes too
            little.
    """
    writer = TextWriter(checkpoint, load_tokenizer(checkpoint.directory), device, dtype)
    return [*chain.from_iterable(writer.batches(tokens, seed))]


class TextWriter:
    """Lets a model write documents, batch by batch.

    Args:
        checkpoint: of the model.
        tokenizer: of the model.
        device: where to run it.
        dtype: to run it in.

    Attributes:
        chat: whether the model answers (it has a chat template) or continues.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Any,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer
        self._device = device
        self._dtype = dtype
        self._pace = PACES[device.type]
        self._model: Any = None
        self.chat = bool(getattr(tokenizer, "chat_template", None))

    @property
    def window(self) -> int:
        """Tokens of a calibration window, unless the user sets them."""
        return self._pace.window

    @property
    def identity(self) -> dict[str, Any]:
        """What the text depends on besides model, device, seed and libraries."""
        return {
            "seeds": seeds_digest(),
            "sampling": dict(SAMPLING),
            "batch": self._pace.batch,
            "answer": self._pace.answer,
            "dtype": str(self._dtype).removeprefix("torch."),
        }

    def batches(
        self, tokens: int, seed: int, kept: Sequence[list[Document]] = ()
    ) -> Iterator[list[Document]]:
        """Documents until there are enough of them; frees the model at the end.

        Args:
            tokens: number to write at least, the prompts' included.
            seed: of the sampling.
            kept: the first batches of an earlier call, which are not written again.

        Raises:
            CheckpointError: the model does not fit or cannot be loaded, or it writes
                too little.
        """
        prompts = seed_prompts("prompt" if self.chat else "start")
        index = used = count = 0
        logger.info("the model writes %d tokens of calibration text itself", tokens)
        progress = tqdm(total=tokens, desc="calibration text", unit="token")
        try:
            while used < ROUNDS * len(prompts):
                size = self._pace.batch
                if count:  # no more than are still needed
                    size = min(size, math.ceil((tokens - count) * used / count))
                if index < len(kept):
                    batch = kept[index]
                else:
                    asked = [*islice(cycle(prompts), used, used + size)]
                    batch = self._write(asked, seed, index)
                index += 1
                used += size
                written = sum(map(self._count, batch))
                count += written
                progress.update(written)
                yield batch
                if count >= tokens:
                    return
        finally:
            progress.close()
            self._free()
        raise CheckpointError(
            f"{self._checkpoint.directory}: the model wrote {count} tokens in {ROUNDS}"
            f" rounds, fewer than the {tokens} that calibration needs; {_GIVE_TEXT}, or"
            " lower --calibration-samples or --calibration-tokens"
        )

    def _write(self, prompts: Sequence[str], seed: int, index: int) -> list[Document]:
        if self._model is None:
            self._model = self._load()
        starts = [self._prompt_ids(prompt) for prompt in prompts]
        longest = max(map(len, starts))
        ids = torch.zeros(len(starts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, start in enumerate(starts):  # padded on the left
            ids[row, longest - len(start) :] = torch.tensor(start)
            mask[row, longest - len(start) :] = 1
        ends = self._ends()
        replies = self._sample(ids, mask, ends, seed, index)[:, longest:].tolist()
        documents = []
        for prompt, reply in zip(prompts, replies, strict=True):
            stop = next((i for i, t in enumerate(reply) if t in ends), len(reply))
            text = self._tokenizer.decode(reply[:stop], skip_special_tokens=True)
            text = text.rstrip("\ufffd")  # a character cut in half by the limit
            if text.strip():
                documents.append(self._document(prompt, text))
        return documents

    @torch.inference_mode()
    def _sample(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        ends: Sequence[int],
        seed: int,
        index: int,
    ) -> torch.Tensor:
        from transformers import GenerationConfig

        config = GenerationConfig(
            **SAMPLING,
            max_new_tokens=self._pace.answer,
            eos_token_id=[*ends] or None,
            pad_token_id=ends[0] if ends else 0,
        )
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(random.Random(f"{seed}.{index}").getrandbits(63))
            return self._model.generate(
                ids.to(self._device),
                attention_mask=mask.to(self._device),
                generation_config=config,
            )

    def _prompt_ids(self, prompt: str) -> list[int]:
        message = {"role": "user", "content": prompt}
        return prompt_ids(
            self._tokenizer,
            [message],
            str(self._checkpoint.directory),
            f"; {_GIVE_TEXT}",
        )

    def _ends(self) -> list[int]:
        """Tokens that end an answer: the model's own, and the tokenizer's."""
        found = getattr(self._model.generation_config, "eos_token_id", None)
        ends = found if isinstance(found, list) else [found]
        ends = [*ends, self._tokenizer.eos_token_id]
        return sorted({end for end in ends if end is not None})

    def _document(self, prompt: str, text: str) -> Document:
        if not self.chat:
            return Document("text", prompt + text)
        answer = {"role": "assistant", "content": text}
        return Document("messages", [{"role": "user", "content": prompt}, answer])

    def _count(self, document: Document) -> int:
        source = as_source([document])
        (ids,) = DocumentTokens(self._tokenizer).tokens(source)
        return len(ids)

    def _load(self) -> Any:
        needed = loaded_bytes(self._checkpoint, self._dtype)
        free = free_memory(self._device)
        where = self._checkpoint.directory
        if free is not None and needed > free:
            raise CheckpointError(
                f"{where}: to write its own calibration text the whole model must be in"
                f" memory, {size_of(needed)} in {self._dtype}, and"
                f" {size_of(free)} are free ({self._device.type}); {_GIVE_TEXT}"
            )
        try:
            return load_model(self._checkpoint, self._dtype, self._device)
        # Unknown architectures, remote code, broken weights: each its own exception.
        except Exception as error:
            raise CheckpointError(
                f"{where}: transformers cannot load the model to write calibration"
                f" text ({error}); {_GIVE_TEXT}"
            ) from error

    def _free(self) -> None:
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        release_freed_memory()


def as_source(documents: Sequence[Document], file: Path = Path()) -> Source:
    """Written documents, all of one kind, as a source that ``file`` will hold."""
    digest = hashlib.sha256(as_jsonl(documents).encode()).hexdigest()
    name = "the model's own text"
    return Source(name, file, digest, documents[0].kind, tuple(documents))


def as_jsonl(documents: Sequence[Document]) -> str:
    """Content of a JSONL file with the documents."""
    objects = (document.to_json() for document in documents)
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)


def writing_dtype(
    stored: torch.dtype, compute: torch.dtype, device: torch.device
) -> torch.dtype:
    """The dtype to write in: the checkpoint's own where the device computes in it.

    Args:
        stored: dtype of the checkpoint's weights.
        compute: dtype of calibration.
        device: where the model runs.
    """
    if device.type == "cuda":
        return stored
    try:
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        native = False
    return stored if stored == torch.bfloat16 and native else compute
