# SPDX-License-Identifier: Apache-2.0
"""The user's path: ``vllm-rsparse prepare``, ``vllm serve``, the openai client.

Tokens are compared with a plain PyTorch model that applies the formula to the same
artifact (``conftest.py``). float32 keeps greedy choices from hanging on rounding.
"""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm")
from vllm_rsparse.testing.server import ServerError

from .served import ALWAYS, NEW_TOKENS, PROMPTS, assert_same_tokens, client, complete

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def server(serve, prepared):
    """A compiled server on which every token of every step goes the sparse route."""
    options = ("--quantization", "rsparse")
    env = {"VLLM_RSPARSE_MAX_SPARSE_TOKENS": ALWAYS}
    with serve(prepared, *options, eager=False, **env) as server:
        yield server


@pytest.fixture(scope="module")
def reference(plain_pytorch, prepared):
    return plain_pytorch(prepared, limit=int(ALWAYS))


def test_log_says_what_runs(server):
    log = server.log_path.read_text()
    assert "rsparse: backend cpu, sparse up to 100000 tokens per step" in log
    # 28 linears of 6.3 million weights in float32.
    assert "rsparse: 28 linears loaded: 24.0 MiB of weights" in log
    assert "Unknown vLLM environment variable" not in log


def test_metrics_beside_vllms_own(server):
    def scrape():
        with urllib.request.urlopen(f"{server.base_url}/metrics") as page:
            lines = [line.rsplit(" ", 1) for line in page.read().decode().splitlines()]
        return {line[0]: float(line[1]) for line in lines if line[0][0] != "#"}

    before = scrape()
    complete(server, PROMPTS[0])
    after = scrape()
    steps = 'vllm_rsparse_step_tokens_count{route="sparse"}'
    # One step for the prompt, then one for each token but the first.
    assert after[steps] - before[steps] == NEW_TOKENS
    assert any(name.startswith("vllm:generation_tokens_total") for name in after)
    kept = 'vllm_rsparse_sampled_channels_kept_total{kind="down_proj"}'
    seen = 'vllm_rsparse_sampled_channels_total{kind="down_proj"}'
    assert 0.1 < after[kept] / after[seen] < 0.9


def test_tokens_equal_plain_pytorch(server, reference):
    assert_same_tokens([complete(server, p)[0] for p in PROMPTS], reference)


def test_eight_concurrent_requests(server, reference):
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        results = list(pool.map(lambda p: complete(server, p)[0], PROMPTS))
    assert_same_tokens(results, reference)


def test_streamed_completion_is_the_same_text(server):
    arguments = {
        "model": "m",
        "prompt": PROMPTS[0],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
    }
    whole = client(server).completions.create(**arguments).choices[0].text
    stream = client(server).completions.create(**arguments, stream=True)
    chunks = [chunk.choices[0].text for chunk in stream]
    assert len(chunks) > 1
    assert "".join(chunks) == whole


def test_chat_streamed_and_not(server):
    arguments = {
        "model": "m",
        "messages": [{"role": "user", "content": "Add two numbers."}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
    }
    chat = client(server).chat.completions
    extra = {"ignore_eos": True}
    whole = chat.create(**arguments, extra_body=extra).choices[0].message.content
    stream = chat.create(**arguments, extra_body=extra, stream=True)
    streamed = [c.choices[0].delta.content or "" for c in stream if c.choices]
    assert "".join(streamed) == whole
    prompt = "# Add two numbers.\ndef "
    plain = client(server).completions.create(
        model="m",
        prompt=prompt,
        max_tokens=NEW_TOKENS,
        temperature=0,
        extra_body=extra,
    )
    assert whole == plain.choices[0].text


def test_two_ranks_of_a_plain_checkpoint_with_artifact_and_default_route(
    serve, pyllama, prepared, plain_pytorch
):
    # One request at a time: the prompt goes dense in one step, each new token sparse.
    overrides = {"quant_method": "rsparse", "artifact": str(prepared / "rsparse")}
    options = ("--hf-overrides", json.dumps({"quantization_config": overrides}))
    options += ("--tensor-parallel-size", "2")
    with serve(pyllama, *options, OMP_NUM_THREADS="1") as server:
        tokens = [complete(server, p)[0] for p in PROMPTS]
        log = server.log_path.read_text()
    assert "sparse up to 2 tokens per step" in log
    assert_same_tokens(tokens, plain_pytorch(prepared, limit=1))
    dense = plain_pytorch(prepared, limit=0)
    assert tokens != [dense.generate(p, NEW_TOKENS)[0] for p in PROMPTS]


def test_zero_sparse_tokens_is_the_base_model(offline, pyllama, prepared):
    sampling = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    ours, theirs = (
        offline.run(
            env,
            {"model": str(model), "max_model_len": 256, "max_num_seqs": 8},
            PROMPTS,
            {**sampling, "logprobs": 0},
        )
        for model, env in (
            (prepared, {"VLLM_RSPARSE_MAX_SPARSE_TOKENS": "0"}),
            (pyllama, {"VLLM_PLUGINS": "none"}),
        )
    )
    assert [len(found["chosen"]) for found in ours] == [NEW_TOKENS] * len(PROMPTS)
    assert ours == theirs  # tokens and log probabilities, bit for bit


def test_plain_checkpoint_without_artifact_says_what_to_do(serve, pyllama):
    with (
        pytest.raises(ServerError, match="names no artifact in its config"),
        serve(pyllama, "--quantization", "rsparse"),
    ):
        pass
