# SPDX-License-Identifier: Apache-2.0
"""Scores windows of tokens through vLLM; ``engine`` starts it in its own process.

Usage: ``python -m vllm_rsparse.evaluate.engine_worker JOB.json``
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_rsparse.op.observers import add_observer
from vllm_rsparse.op.operands import SparseOperands
from vllm_rsparse.op.reference import kept_mask


class KeptChannels:
    """Counts the channels that sparse calls keep, per linear of the checkpoint."""

    def __init__(self) -> None:
        self._names: dict[int, list[str]] = {}
        # By linear and plane of its weight.
        self._kept: Counter[tuple[str, int]] = Counter()
        self._seen: Counter[str] = Counter()

    def watch(self, model: torch.nn.Module) -> None:
        """Count from now on; the model must run eagerly, in this process."""
        for module in model.modules():
            if hasattr(module, "rsparse_thresholds"):
                method: Any = module.quant_method
                self._names[method.layer_number] = method.names
        add_observer(self._observe)

    def fractions(self) -> dict[str, list[float]]:
        """Fractions kept by each plane, by linear; empty if no call was sparse."""
        found: dict[str, list[float]] = {name: [] for name in self._seen}
        for (name, _), kept in sorted(self._kept.items()):
            found[name].append(kept / self._seen[name])
        return found

    def _observe(
        self, layer: int, x: Tensor, operands: SparseOperands, dense: bool
    ) -> None:
        names = self._names.get(layer)
        if dense or names is None:
            return
        kept = kept_mask(x, operands.thresholds).sum(dim=(1, 2)).tolist()
        # A row for each linear and the first plane, then for the next.
        for index, count in enumerate(kept):
            self._kept[names[index % len(names)], index // len(names)] += count
        for name in names:
            self._seen[name] += x.numel()


def score(job: dict[str, Any]) -> dict[str, Any]:
    """Run the engine over the job's windows; returns what ``engine`` reads."""
    import vllm
    from vllm.platforms import current_platform

    device = current_platform.device_type
    dtype = job["dtype"]
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    windows: list[list[int]] = job["windows"]
    length = len(windows[0])
    llm = vllm.LLM(
        model=job["model"],
        dtype=dtype,
        max_model_len=length + 1,  # vLLM generates at least one token
        # One window per step: the logits of more, positions x vocabulary in float32,
        # are memory that vLLM does not plan for.
        max_num_seqs=1,
        max_num_batched_tokens=length + 1,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    kept = KeptChannels()
    llm.apply_model(kept.watch)
    outputs = llm.generate(
        [{"prompt_token_ids": window} for window in windows],
        vllm.SamplingParams(max_tokens=1, prompt_logprobs=1, detokenize=False),
    )
    values: list[float] = []
    likeliest: list[int] = []
    for window, output in zip(windows, outputs, strict=True):
        # Entry i is about token i, which position i - 1 predicts; entry 0 is None.
        for i in range(job["first"] + 1, length):
            found = output.prompt_logprobs[i]
            values.append(found[window[i]].logprob)
            likeliest.append(max(found, key=lambda token: found[token].logprob))
    return {
        "log_probabilities": values,
        "likeliest": likeliest,
        "kept": kept.fractions(),
        "run": {"device": device, "dtype": dtype, "vllm": vllm.__version__},
    }


def main() -> None:
    """Read the job, write the scores."""
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["result"]).write_text(json.dumps(score(job)))


if __name__ == "__main__":
    main()
