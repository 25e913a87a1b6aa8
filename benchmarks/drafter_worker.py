# SPDX-License-Identifier: Apache-2.0
"""One engine of ``drafters.py``, in its own process (started by that script).

Reads a JSON job on the command line, prints a JSON result on its last line. Prompts run
one after another, so every step is that of a single user.
"""

import fcntl
import json
import sys
import time
from collections import Counter
from typing import Any

# First: it sets the environment of an engine in this process.
from serve_worker import held
from vllm import LLM, SamplingParams

# vLLM's metrics: a histogram with an entry for each step, and counters.
COUNTS = {
    "vllm:iteration_tokens_total": "steps",
    "vllm:spec_decode_num_accepted_tokens": "accepted",
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "proposed",
}
WARM = 2  # prompts that are answered before any is timed


class Engine:
    """An engine and its prompts.

    Args:
        job: as ``drafters.py`` writes it.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        self._llm = LLM(
            model=job["model"],
            dtype=job["dtype"],
            enforce_eager=job["eager"],
            max_model_len=job["max_model_len"],
            # More than the one that runs: of one alone vLLM captures graphs so small
            # that none may be a multiple of k + 1 tokens.
            max_num_seqs=4,
            enable_prefix_caching=False,
            disable_log_stats=False,
            seed=0,
            speculative_config=job["drafter"],
            **job["engine"],
        )

    def complete(
        self, tokens: int, prompts: int | None = None, **options: Any
    ) -> tuple[float, list[Any]]:
        """Greedy completions of at most ``tokens`` tokens, of all or some prompts.

        Returns:
            Seconds, and vLLM's completions.
        """
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, detokenize=False, **options
        )
        start = time.perf_counter()
        found = [
            self._llm.generate([prompt], sampling, use_tqdm=False)[0].outputs[0]
            for prompt in self._prompts[:prompts]
        ]
        return time.perf_counter() - start, found

    def counts(self) -> Counter[str]:
        """Steps, and drafts if there is a drafter, since the start."""
        found: Counter[str] = Counter()
        for metric in self._llm.get_metrics():
            if name := COUNTS.get(metric.name):
                # A histogram has a count, a counter a value.
                found[name] = metric.count if hasattr(metric, "count") else metric.value
        return found


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Time the answers.

    Returns:
        Tokens per second of each repeat, from the first token of an answer to its last;
        the tokens of each prompt; steps and drafts of all repeats; and without a
        drafter the log probabilities of the most likely tokens at each position.
    """
    with held(job, fcntl.LOCK_SH):
        engine = Engine(job)
    with held(job, fcntl.LOCK_EX):
        engine.complete(job["tokens"], WARM)
        rates, passes = [], []
        counts: Counter[str] = Counter()
        for _ in range(job["repeats"]):
            prefill, _ = engine.complete(1)
            counts.subtract(engine.counts())
            seconds, found = engine.complete(job["tokens"])
            counts.update(engine.counts())
            passes.append([list(one.token_ids) for one in found])
            made = sum(len(ids) - 1 for ids in passes[-1])
            rates.append(made / (seconds - prefill))
    result = {
        "rates": rates,
        "tokens": passes[0],
        "repeatable": all(one == passes[0] for one in passes),
        "counts": counts,
    }
    if job["drafter"] is None:
        _, found = engine.complete(job["tokens"], logprobs=job["alternatives"])
        result["likely"] = [
            [{token: entry.logprob for token, entry in at.items()} for at in one]
            for one in (answer.logprobs for answer in found)
        ]
    return result


if __name__ == "__main__":
    print("\n" + json.dumps(measure(json.loads(sys.argv[1]))))
