# SPDX-License-Identifier: Apache-2.0
"""Parts of ``benchmarks/real_model`` that need no model."""

import json
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

PROBLEM = {
    "prompt": 'import math\n\n\ndef area(r):\n    """Area of a circle."""\n',
    "entry_point": "area",
    "test": "def check(candidate):\n    assert abs(candidate(1) - 3.14159) < 1e-3",
}
BODY = "def area(r):\n    return math.pi * r * r\n"


@pytest.fixture
def load(repository: Path) -> Callable[[str], ModuleType]:
    def script(name: str) -> ModuleType:
        file = repository / "benchmarks" / "real_model" / f"{name}.py"
        spec = spec_from_file_location(f"real_model_{name}", file)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return script


def test_prompts_are_of_four_domains_and_differ(repository: Path) -> None:
    file = repository / "benchmarks" / "real_model" / "prompts.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    domains = [line["domain"] for line in lines]
    assert {domain: domains.count(domain) for domain in domains} == dict.fromkeys(
        ("code", "chat", "math", "prose"), 22
    )
    assert len({line["prompt"] for line in lines}) == len(lines)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (f"Here it is:\n```python\n{BODY}```\nIt uses pi.", True),
        (f"```python\nimport math\n{BODY}```", True),
        (f"```\n{BODY}", True),  # cut off before the block ends
        (BODY, True),
        ("    return math.pi * r ** 2\n", True),  # the body alone
        ("```python\ndef area(r):\n    return r\n```", False),
        ("I cannot do that.", False),
        ("```python\ndef area(r):\n    while True:\n        pass\n```", False),
    ],
)
def test_an_answer_is_run_with_its_test(
    load: Callable[[str], ModuleType],
    answer: str,
    right: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    humaneval = load("humaneval")
    monkeypatch.setattr(humaneval, "SECONDS", 2)
    assert humaneval.passes(humaneval.program(PROBLEM, answer)) is right


def test_an_answer_cannot_take_all_memory(load: Callable[[str], ModuleType]) -> None:
    assert not load("humaneval").passes("x = bytearray(8 << 30)")


def test_flips_and_their_interval(load: Callable[[str], ModuleType]) -> None:
    dense = [True] * 10 + [False] * 10
    sparse = [False] * 4 + [True] * 6 + [True] * 1 + [False] * 9
    found = load("humaneval").paired(dense, sparse)
    assert (found["lost"], found["gained"]) == (4, 1)
    assert found["difference"] == pytest.approx(-0.15)
    low, high = found["interval_95"]
    # About 1.96 standard errors of (b - a): sqrt(5/20 - 0.15^2) / sqrt(20) = 0.107.
    assert low == pytest.approx(-0.35, abs=0.06)
    assert high == pytest.approx(0.05, abs=0.06)
    assert found["mcnemar_p"] == pytest.approx(2 * 6 / 32)
    assert load("humaneval").paired(dense, dense)["mcnemar_p"] == 1.0


def test_tensors_of_gemma_have_the_names_and_norms_of_transformers(
    load: Callable[[str], ModuleType],
) -> None:
    gguf = load("from_gguf")
    config = {"num_attention_heads": 2, "num_key_value_heads": 1}

    def renamed(name: str) -> tuple[str, list[float]]:
        found, tensor = gguf.renamed(
            name, torch.tensor([1.0, 3.0]), gguf.KINDS["gemma3"], config
        )
        return found, tensor.tolist()

    layer = "model.layers.4."
    for theirs, ours in {
        "attn_norm": "input_layernorm",
        "attn_q_norm": "self_attn.q_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }.items():
        assert renamed(f"blk.4.{theirs}.weight") == (f"{layer}{ours}.weight", [0, 2])
    assert renamed("output_norm.weight") == ("model.norm.weight", [0, 2])
    # Not turned: only Llama's rotate neighbouring channels.
    assert renamed("blk.4.attn_q.weight") == (f"{layer}self_attn.q_proj.weight", [1, 3])


def test_only_llama_rotates_neighbouring_channels(
    load: Callable[[str], ModuleType],
) -> None:
    gguf = load("from_gguf")
    config = {"num_attention_heads": 1, "num_key_value_heads": 1}
    rows = torch.arange(4.0)[:, None]
    name = "blk.0.attn_q.weight"
    _, turned = gguf.renamed(name, rows, gguf.KINDS["llama"], config)
    assert turned.flatten().tolist() == [0, 2, 1, 3]
    _, same = gguf.renamed(name, rows, gguf.KINDS["qwen2"], config)
    assert torch.equal(same, rows)
