# SPDX-License-Identifier: Apache-2.0
"""One engine of ``bench_serve.py``, in its own process (started by that script).

Reads a JSON job on the command line, prints a JSON result on its last line.
"""

import fcntl
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

# In-process engine: no scheduler process adds its own latency to a step. Functions of
# this file then reach the workers of several ranks by name.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# GiB on a CPU. The default is a share of the machine, and fails if others use it.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

import torch
from random_model import SHAPES
from vllm import LLM, SamplingParams

from vllm_rsparse.model.names import HEAD

VOCABULARY_MARGIN = 16  # keep clear of special tokens

# Shares of the channels that are kept, one for each plane of the weight.
Shares = list[float]
# By a linear's name in the checkpoint, a value for each plane.
ByName = dict[str, list[float]]


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
    """Time a dense engine, or a sparse one with each of its targets.

    Thresholds are tensors that the captured graphs read, so one engine serves every
    target that has the same ranks.

    Returns:
        Start-up seconds, memory, and by target (``dense`` for an engine without)
        the times and the kept fraction.
    """
    started = time.perf_counter()
    with held(job, fcntl.LOCK_SH):
        llm = make_engine(job)
    result: dict[str, Any] = {"start_s": time.perf_counter() - started}
    if torch.cuda.is_available():
        result["memory_gib"] = max(llm.apply_model(allocated)) / 2**30
    runs = {}
    with held(job, fcntl.LOCK_EX):
        # Calibrations that started together with this engine are finished now.
        thresholds = {"dense": None}
        if "found" in job:
            thresholds = json.loads(Path(job["found"]).read_text())
        for sparsity, found in thresholds.items():
            if found is not None:
                llm.apply_model(partial(set_thresholds, found["thresholds"]))
            runs[sparsity] = times(llm, job)
            if found is not None:
                runs[sparsity]["kept_fraction"] = found["kept_fraction"]
    return {**result, "runs": runs}


@contextmanager
def held(job: dict[str, Any], kind: int) -> Iterator[None]:
    """Start with others, or be timed alone, where engines start together."""
    if "lock" not in job:
        yield
        return
    with open(job["lock"], "w") as file:
        fcntl.flock(file, kind)
        yield


def times(llm: LLM, job: dict[str, Any]) -> dict[str, Any]:
    """Decode milliseconds per step for each batch size, and prefill milliseconds.

    A step's time is the difference between a long and a short generation, divided by
    the difference in tokens: prefill and the engine's start drop out.
    """
    result: dict[str, Any] = {"decode_ms": {}}
    short, long = 8, 8 + job["new_tokens"]
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
        taken = [1e3 * seconds(llm, inputs, 1) for _ in range(job["repeats"])]
        result["prefill_ms"] = spread(taken)
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
    """Those of the decoder; an output layer that rsparse serves is dense."""
    layers = [m for m in model.modules() if hasattr(m, "rsparse_thresholds")]
    return [layer for layer in layers if layer.quant_method.names != [HEAD]]


def watch(tokens: int, model: torch.nn.Module) -> None:
    """Before every call of at most ``tokens`` tokens, look at its input."""
    for layer in sparse_layers(model):
        layer.bench_seen = []
        layer.bench_shares = None
        layer.register_forward_pre_hook(partial(_see, tokens))


def _see(tokens: int, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    values = inputs[0].float().abs()
    if values.shape[0] > tokens:
        return
    layer.bench_seen.append(values)
    if layer.bench_shares is not None:
        # This call keeps exactly the shares, so that the next layer's input is that of
        # the sparse model from the first step on.
        found = [threshold(values, share) for share in layer.bench_shares]
        _set_rows(layer, [found] * len(layer.quant_method.names))


def threshold(values: torch.Tensor, kept_share: float) -> float:
    """The value that this share of the values is above."""
    flat = values.flatten()
    rank = max(1, round((1 - kept_share) * flat.numel()))
    return flat.kthvalue(rank).values.item()


def aim(shares: Shares | None, model: torch.nn.Module) -> None:
    """From now on keep these shares at every call; None: leave the thresholds alone."""
    for layer in sparse_layers(model):
        layer.bench_shares = shares
        layer.bench_seen.clear()


def quantiles(shares: Shares, model: torch.nn.Module) -> ByName:
    """By checkpoint name, the thresholds that would have kept these shares."""
    thresholds = {}
    for layer in sparse_layers(model):
        seen = torch.cat(layer.bench_seen)
        values = [threshold(seen, share) for share in shares]
        thresholds |= dict.fromkeys(layer.quant_method.names, values)
    return thresholds


def set_thresholds(thresholds: ByName, model: torch.nn.Module) -> None:
    for layer in sparse_layers(model):
        _set_rows(layer, [thresholds[name] for name in layer.quant_method.names])


def _set_rows(layer: torch.nn.Module, thresholds: list[list[float]]) -> None:
    """A layer's thresholds, by fused linear and plane; rows are planes of linears."""
    rows = torch.tensor(thresholds).t().reshape(-1, 1)
    layer.rsparse_thresholds.copy_(rows.expand_as(layer.rsparse_thresholds))


def kept_fractions(thresholds: ByName, model: torch.nn.Module) -> ByName:
    """By checkpoint name, the shares of what was seen that are over the thresholds."""
    kept = {}
    for layer in sparse_layers(model):
        seen = torch.cat(layer.bench_seen)
        for name in layer.quant_method.names:
            over = [seen > threshold for threshold in thresholds[name]]
            kept[name] = [part.float().mean().item() for part in over]
    return kept


def allocated(model: torch.nn.Module) -> int:
    return torch.cuda.max_memory_allocated()


def mean_over_ranks(values: list[ByName]) -> ByName:
    means = {}
    for name in values[0]:
        planes = zip(*(rank[name] for rank in values), strict=True)
        means[name] = [statistics.mean(plane) for plane in planes]
    return means


def calibrate(job: dict[str, Any]) -> dict[str, Any]:
    """Find thresholds that keep the wanted fractions, and count what decoding keeps.

    Inputs change when the layers before become sparse. So the model first decodes with
    thresholds that follow each call, then the quantiles of what the layers saw are
    fixed, twice, and the last round is counted.

    Returns:
        By target, ``thresholds`` by checkpoint name and ``kept_fraction`` (of the
        channels, or for weights in planes of the weights' bits).
    """
    with held(job, fcntl.LOCK_SH):
        return _calibrate(job, make_engine(job, enforce_eager=True))


def _calibrate(job: dict[str, Any], llm: LLM) -> dict[str, Any]:
    batch = prompts(job, 4, 32)
    llm.apply_model(partial(watch, len(batch)))
    found = {}
    for target, shares in job["targets"].items():
        llm.apply_model(partial(aim, shares))
        seconds(llm, batch, 24)
        for _ in range(2):
            thresholds = mean_over_ranks(llm.apply_model(partial(quantiles, shares)))
            llm.apply_model(partial(set_thresholds, thresholds))
            llm.apply_model(partial(aim, None))
            seconds(llm, batch, 24)
        kept = mean_over_ranks(llm.apply_model(partial(kept_fractions, thresholds)))
        shapes = SHAPES[job["shape"]].linears
        sizes = {name: math.prod(shapes[name.split(".", 3)[3]]) for name in kept}
        read = sum(statistics.mean(kept[name]) * size for name, size in sizes.items())
        found[target] = {
            "thresholds": thresholds,
            "kept_fraction": read / sum(sizes.values()),
        }
    Path(job["found"]).write_text(json.dumps(found))
    return {key: value["kept_fraction"] for key, value in found.items()}


def main() -> None:
    job = json.loads(sys.argv[1])
    if job.get("load_format") == "rsparse_random":
        import random_weights  # noqa: F401 (registers the format)
    result = {"measure": measure, "calibrate": calibrate}[job["task"]](job)
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
