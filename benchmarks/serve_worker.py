# SPDX-License-Identifier: Apache-2.0
"""One engine of ``bench_serve.py``, in its own process (started by that script).

Reads a JSON job on the command line, prints a JSON result on its last line.
"""

import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

# In-process engine: no scheduler process adds its own latency to a step. Functions of
# this file then reach the workers of several ranks by name.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# GiB on a CPU. The default is a share of the machine, and fails if others use it.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

import torch
from random_model import SHAPES, write_sparse_model
from vllm import LLM, SamplingParams

VOCABULARY_MARGIN = 16  # keep clear of special tokens


def make_engine(job: dict[str, Any], **options: Any) -> LLM:
    """The engine that the job describes."""
    return LLM(
        model=job["model"],
        load_format=job.get("load_format", "dummy"),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=job["max_model_len"],
        max_num_seqs=job["max_num_seqs"],
        enable_prefix_caching=False,
        seed=0,
        **job.get("engine", {}),
        **options,
    )


def prompts(job: dict[str, Any], batch: int, length: int) -> list[dict[str, list[int]]]:
    """Random token prompts, the same for every engine of a run."""
    generator = torch.Generator().manual_seed(batch * 10007 + length)
    size = SHAPES[job["shape"]].vocabulary
    ids = torch.randint(VOCABULARY_MARGIN, size, (batch, length), generator=generator)
    return [{"prompt_token_ids": row.tolist()} for row in ids]


def seconds(llm: LLM, inputs: list[Any], new_tokens: int) -> float:
    """Wall-clock seconds of one generation of exactly ``new_tokens`` per prompt."""
    sampling = SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
    )
    start = time.perf_counter()
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    elapsed = time.perf_counter() - start
    made = {len(o.outputs[0].token_ids) for o in outputs}
    if made != {new_tokens}:
        raise RuntimeError(f"requested {new_tokens} tokens per prompt, got {made}")
    return elapsed


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Decode milliseconds per step for each batch size, and prefill milliseconds.

    A step's time is the difference between a long and a short generation, divided by
    the difference in tokens: prefill and the engine's start drop out.
    """
    started = time.perf_counter()
    llm = make_engine(job)
    result: dict[str, Any] = {"start_s": time.perf_counter() - started}
    if torch.cuda.is_available():
        result["memory_gib"] = max(llm.apply_model(allocated)) / 2**30
    short, long = 8, 8 + job["new_tokens"]
    result["decode_ms"] = {}
    for batch in job["batches"]:
        inputs = prompts(job, batch, 32)
        seconds(llm, inputs, long)
        steps = []
        for _ in range(job["repeats"]):
            difference = seconds(llm, inputs, long) - seconds(llm, inputs, short)
            steps.append(1e3 * difference / (long - short))
        result["decode_ms"][batch] = spread(steps)
    if job["prefill"]:
        inputs = prompts(job, 1, job["prefill"])
        seconds(llm, inputs, 1)
        times = [1e3 * seconds(llm, inputs, 1) for _ in range(job["repeats"])]
        result["prefill_ms"] = spread(times)
    return result


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest of a few runs."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


# What runs inside the engine's workers, one per rank.


def sparse_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if hasattr(m, "rsparse_thresholds")]


def watch(tokens: int, model: torch.nn.Module) -> None:
    """Keep |x| of every call of at most ``tokens`` tokens."""
    for layer in sparse_layers(model):
        layer.bench_seen = []
        layer.register_forward_pre_hook(partial(_see, tokens))


def _see(tokens: int, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    if inputs[0].shape[0] <= tokens:
        layer.bench_seen.append(inputs[0].float().abs().cpu())


def take_seen(layer: torch.nn.Module) -> torch.Tensor:
    values = torch.cat(layer.bench_seen).flatten()
    layer.bench_seen.clear()
    return values


def quantiles(kept_share: float, model: torch.nn.Module) -> dict[str, float]:
    """By checkpoint name, the threshold that would have kept this share."""
    thresholds = {}
    for layer in sparse_layers(model):
        values = take_seen(layer)
        rank = max(1, round((1 - kept_share) * values.numel()))
        threshold = values.kthvalue(rank).values.item()
        thresholds |= dict.fromkeys(layer.quant_method.names, threshold)
    return thresholds


def set_thresholds(thresholds: dict[str, float], model: torch.nn.Module) -> None:
    for layer in sparse_layers(model):
        for index, name in enumerate(layer.quant_method.names):
            layer.rsparse_thresholds[index] = thresholds[name]


def kept_fractions(
    thresholds: dict[str, float], model: torch.nn.Module
) -> dict[str, float]:
    """By checkpoint name, the share of what was seen that is over the threshold."""
    kept = {}
    for layer in sparse_layers(model):
        values = take_seen(layer)
        for name in layer.quant_method.names:
            kept[name] = (values > thresholds[name]).float().mean().item()
    return kept


def allocated(model: torch.nn.Module) -> int:
    return torch.cuda.max_memory_allocated()


def mean_over_ranks(values: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.mean(v[name] for v in values) for name in values[0]}


def calibrate(job: dict[str, Any]) -> dict[str, Any]:
    """Set thresholds that keep the wanted fraction, and count what decoding keeps.

    Inputs change when the layers before become sparse, so quantiles are taken on the
    sparse model's own decode steps, a few rounds, and the last round counts.
    """
    llm = make_engine(job, enforce_eager=True)
    batch = prompts(job, 4, 32)
    kept_share = job["rho"] * (1 - job["sparsity"])
    llm.apply_model(partial(watch, len(batch)))
    for _ in range(3):
        seconds(llm, batch, 24)
        thresholds = mean_over_ranks(llm.apply_model(partial(quantiles, kept_share)))
        llm.apply_model(partial(set_thresholds, thresholds))
    seconds(llm, batch, 24)
    kept = mean_over_ranks(llm.apply_model(partial(kept_fractions, thresholds)))
    write_sparse_model(
        Path(job["model"]),
        SHAPES[job["shape"]],
        job["sparsity"],
        job["rho"],
        thresholds,
        kept,
        job["weights"],
    )
    shapes = SHAPES[job["shape"]].linears
    total = sum(n * k for n, k in shapes.values()) * SHAPES[job["shape"]].layers
    read = sum(
        kept[name] * n * k for name in kept for n, k in [shapes[name.split(".", 3)[3]]]
    )
    return {"kept_fraction": read / total}


def main() -> None:
    job = json.loads(sys.argv[1])
    if job.get("load_format") == "rsparse_random":
        import random_weights  # noqa: F401 (registers the format)
    result = {"measure": measure, "calibrate": calibrate}[job["task"]](job)
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
