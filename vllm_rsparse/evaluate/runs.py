# SPDX-License-Identifier: Apache-2.0
"""What ``evaluate`` runs: windows of text, or chats; a table and figures out."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from vllm_rsparse import __version__
from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.artifact.tensors import file_sha256
from vllm_rsparse.errors import SettingError
from vllm_rsparse.evaluate.chats import answers_of, by_domain
from vllm_rsparse.evaluate.engine import check_engine, measure_served
from vllm_rsparse.evaluate.loading import SwitchableModel
from vllm_rsparse.evaluate.measure import (
    Loss,
    dense_positions,
    measure,
    measure_passages,
)
from vllm_rsparse.evaluate.plot import draw
from vllm_rsparse.evaluate.report import chat_table, table
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.checkpoint_files import resolve_model
from vllm_rsparse.model.device import choose_device
from vllm_rsparse.texts.documents import read_sources
from vllm_rsparse.texts.prompts import read_prompts
from vllm_rsparse.texts.tokens import load_tokenizer
from vllm_rsparse.texts.windows import spread_windows


def run_text(
    args: argparse.Namespace, prepared: Sequence[PreparedDirectory]
) -> dict[str, Any]:
    """Measure windows of text and print the table; the figures for JSON."""
    first = dense_positions(args.window, args.dense_fraction)
    sources = read_sources(args.data, "--data")
    tokenizer = load_tokenizer(args.directory)
    text = spread_windows(tokenizer, sources, args.window, args.max_windows)
    measured = _measure_vllm if args.engine == "vllm" else _measure_torch
    losses, ran = measured(args, prepared, text.windows, first)
    print(table(losses))
    if args.plot is not None:
        draw(losses, [one.recipe for one in prepared], args.plot)
    return {
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
        "versions": _versions() | ran.versions,
    }


def run_chat(
    args: argparse.Namespace, prepared: Sequence[PreparedDirectory]
) -> dict[str, Any]:
    """Measure answers to prompts and print the table; the figures for JSON."""
    prompts = read_prompts(args.chat, load_tokenizer(args.directory))
    device, dtype = _device_and_dtype(args)
    model = SwitchableModel(prepared[0].checkpoint, device, dtype)
    reference: SwitchableModel = model
    candidates: list[PreparedDirectory | None] = [*prepared]
    if args.reference is not None:
        base = Checkpoint(resolve_model(args.reference))
        reference = SwitchableModel(base, device, dtype)
        if reference.vocab_size != model.vocab_size:
            raise SettingError(
                f"--reference {args.reference}: has {reference.vocab_size} tokens, and"
                f" {args.directory} {model.vocab_size}; give the model that it was"
                " made from"
            )
        candidates = [None, *prepared]  # what the base alone loses
    answers = answers_of(reference, prompts, args.answer_tokens, args.answers)
    domains = {
        domain: measure_passages(model, candidates, passages, reference)
        for domain, passages in by_domain(answers).items()
    }
    print(chat_table(domains))
    return {
        "results": [
            {"domain": domain, **asdict(loss)}
            for domain, losses in domains.items()
            for loss in losses
        ],
        "protocol": {
            "engine": args.engine,
            "reference": str(reference.directory),
            "prompts": len(prompts),
            "answers": len(answers),
            "answer_tokens": args.answer_tokens,
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
        },
        "data": [{"file": str(args.chat), "sha256": file_sha256(args.chat)}],
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {
        "vllm_rsparse": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


@dataclass(frozen=True)
class _Ran:
    """What the figures were computed on."""

    device: str
    dtype: str
    versions: dict[str, str] = field(default_factory=dict)


def _measure_torch(
    args: argparse.Namespace,
    prepared: Sequence[PreparedDirectory],
    windows: Tensor,
    first: int,
) -> tuple[list[Loss], _Ran]:
    device, dtype = _device_and_dtype(args)
    model = SwitchableModel(prepared[0].checkpoint, device, dtype)
    model.check_window(args.window)
    losses = measure(model, prepared, windows, first)
    return losses, _Ran(device.type, str(dtype).removeprefix("torch."))


def _device_and_dtype(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    device = choose_device(args.device)
    name = args.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return device, getattr(torch, name)


def _measure_vllm(
    args: argparse.Namespace,
    prepared: Sequence[PreparedDirectory],
    windows: Tensor,
    first: int,
) -> tuple[list[Loss], _Ran]:
    check_engine(prepared[0], args.window)
    losses, run = measure_served(prepared, windows, first, args.dtype)
    return losses, _Ran(run.device, run.dtype, {"vllm": run.vllm})
