# SPDX-License-Identifier: Apache-2.0
"""Train a Llama of 117 M parameters on the tokens that ``text.py`` gathered.

    python benchmarks/small_model/train.py TEXT MODEL --seconds 240

Writes the folder MODEL: a bf16 checkpoint with the bundled model's tokenizer, and
training.json. AdamW, cosine over wall time, bf16 autocast on float32 weights.
"""

import argparse
import json
import lzma
import math
import shutil
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from limits import time_limit
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

START = time.monotonic()
TOKENIZER = Path(__file__).resolve().parents[2] / "tests/assets/pyllama-8m"
SAVING = 10  # seconds kept for it
COMPILING = 0.4  # of the time, at most
WARM_UP = 200  # steps
SIZES: dict[str, dict[str, Any]] = {
    "117m": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 10,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "46m": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
# Tokens of a window, windows of a step, peak learning rate.
STEPS = {"117m": (1024, 32, 1e-3), "46m": (1024, 32, 1e-3), "tiny": (128, 4, 3e-3)}

Step = Callable[[Tensor], Tensor]


def load_tokens(folder: Path) -> Tensor:
    """int32 [tokens], all shards joined."""
    files = sorted(folder.glob("train*.u16.xz"))
    if not files:
        raise SystemExit(f"{folder}: no train*.u16.xz; make it with text.py")
    with ThreadPoolExecutor(16) as pool:  # lzma lets go of the GIL
        raw = list(pool.map(lambda file: lzma.decompress(file.read_bytes()), files))
    tokens = np.concatenate([np.frombuffer(one, dtype="<u2") for one in raw])
    return torch.from_numpy(tokens.astype(np.int32))


class Batches:
    """Windows one token longer than the model's input, in a random order."""

    def __init__(self, tokens: Tensor, length: int, batch: int) -> None:
        count = len(tokens) // (length + 1)
        self.windows = tokens[: count * (length + 1)].view(count, length + 1)
        self.order = torch.randperm(count).to(tokens.device)
        self.batch = batch

    def __getitem__(self, step: int) -> Tensor:
        """int64 [batch, length + 1]; after the last window comes the first again."""
        index = torch.arange(step * self.batch, (step + 1) * self.batch)
        chosen = self.order[index.to(self.order.device) % len(self.order)]
        return self.windows[chosen].long()


def loss_function(model: nn.Module, device: torch.device) -> Step:
    """int64 [batch, length + 1] -> mean negative log likelihood."""

    def loss(ids: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return functional.cross_entropy(
            logits.float().flatten(0, 1), ids[:, 1:].flatten()
        )

    return loss


def compiled(
    loss: Step, ids: Tensor, model: nn.Module, limit: float
) -> tuple[Step, str]:
    """The compiled function, or the same one where that fails or passes ``limit`` s.

    Returns:
        What to call, and how it runs, for the record.
    """
    started = time.monotonic()
    try:
        with time_limit(limit):
            result: Step = torch.compile(loss)
            result(ids).backward()
    except Exception as error:  # the compiler's are of many kinds
        traceback.print_exc()
        return loss, f"eager: compiling failed ({type(error).__name__})"
    finally:
        model.zero_grad(set_to_none=True)
    return result, f"compiled in {time.monotonic() - started:.0f} s"


def make_optimizer(model: nn.Module, peak: float) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


def train(
    model: nn.Module, loss: Step, batches: Batches, peak: float, until: float
) -> list[dict[str, float]]:
    """Train until ``until``, seconds since the start.

    Returns:
        Seconds, steps and loss, every ten seconds and at the end.
    """
    optimizer = make_optimizer(model, peak)
    begun = _now()
    log: list[dict[str, float]] = []
    step = 0
    while _now() < until or not step:
        part = min(1.0, (_now() - begun) / (until - begun))
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * part))
        for group in optimizer.param_groups:
            group["lr"] = peak * cosine * min(1.0, (step + 1) / WARM_UP)
        value = loss(batches[step])
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 8 == 0 and value.is_cuda:
            torch.cuda.synchronize()  # or the clock runs behind the device's work
        if not log or _now() - log[-1]["seconds"] > 10 or _now() >= until:
            log.append({"seconds": _now(), "steps": step, "loss": value.item()})
            print(f"{_now():6.1f} s, step {step}, loss {value.item():.3f}", flush=True)
    return log


def _now() -> float:
    return time.monotonic() - START


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", metavar="TEXT", type=Path, help="made by text.py")
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder to make")
    parser.add_argument("--seconds", type=float, default=240, help="after imports")
    parser.add_argument("--size", choices=SIZES, default="117m")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    args.model.mkdir(parents=True)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    length, batch, peak = STEPS[args.size]
    config = LlamaConfig(
        vocab_size=4096,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        **SIZES[args.size],
    )
    tokens = load_tokens(args.text).to(device)
    batches = Batches(tokens, length, batch)
    model = LlamaForCausalLM(config).to(device)
    loss, how = loss_function(model, device), "eager"
    if not args.eager:
        loss, how = compiled(loss, batches[0], model, args.seconds * COMPILING)
    log = train(model, loss, batches, peak, args.seconds - SAVING)
    record: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "how": how,
        "tokens_seen": log[-1]["steps"] * batch * length,
        "distinct_tokens": len(tokens),
        "window": length,
        "batch": batch,
        "peak_learning_rate": peak,
        "config": config.to_dict(),
        "log": log,
    }
    model.to(torch.bfloat16).save_pretrained(args.model)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, args.model)
    (args.model / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"{record['parameters'] / 1e6:.1f} M parameters, {how}, {log[-1]['steps']}"
        f" steps, {record['tokens_seen']} tokens, {_now():.0f} s"
    )


if __name__ == "__main__":
    main()
