# SPDX-License-Identifier: Apache-2.0
"""Log probabilities of given tokens through vLLM, run by ``served.py``.

Usage: score_offline.py MODEL TOKENS.json OUT.json; every token takes the sparse route.
"""

import json
import os
import sys

os.environ["VLLM_RSPARSE_MAX_SPARSE_TOKENS"] = "100000"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main() -> None:
    from vllm import LLM, SamplingParams

    model, tokens_path, out_path = sys.argv[1:]
    with open(tokens_path) as stream:
        tokens = json.load(stream)
    llm = LLM(
        model=model,
        dtype="float32",
        max_model_len=len(tokens) + 8,
        max_num_seqs=2,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": tokens}], sampling)
    pairs = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
    with open(out_path, "w") as stream:
        json.dump([found[token].logprob for token, found in pairs], stream)


if __name__ == "__main__":
    main()
