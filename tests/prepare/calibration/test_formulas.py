# SPDX-License-Identifier: Apache-2.0
"""What ``prepare`` computes, held to the formulas in float64.

The reference below shares nothing with the package but the format: transformers runs
the whole model in float64, hooks collect the inputs, NumPy does the rest.
"""

import math
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.pipeline import prepare

SPARSITY, RHO, SAMPLES, TOKENS, SEED = 0.5, 0.95, 3, 256, 7
TEXTS = tuple(
    Path(sysconfig.get_path("stdlib")) / name for name in ("argparse.py", "ast.py")
)


@pytest.fixture(scope="module")
def prepared(pyllama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "out"
    options = PrepareOptions(
        model=str(pyllama),
        output=output,
        sparsity=SPARSITY,
        calibration_data=TEXTS,
        recipe="uniform",
        rho=RHO,
        samples=SAMPLES,
        tokens=TOKENS,
        device="cpu",
        seed=SEED,
    )
    prepare(options)
    return output


@pytest.fixture(scope="module")
def dense(pyllama: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Weight [N, K] and calibration input [tokens, K] of every linear, in float64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(pyllama)
    stream: list[int] = []
    for file in TEXTS:
        if stream:  # what separates documents
            stream.append(tokenizer.eos_token_id)
        stream += tokenizer(file.read_text("utf-8"), add_special_tokens=False).input_ids
    generator = random.Random(SEED)
    draws = [generator.random() for _ in range(len(stream) // TOKENS)]
    chosen = np.argsort(draws)[:SAMPLES]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        pyllama, dtype=torch.float64
    )
    inputs: dict[str, list[torch.Tensor]] = {}
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    for name, module in linears.items():
        inputs[name] = []
        module.register_forward_pre_hook(
            lambda module, args, name=name: inputs[name].append(args[0][0])
        )
    with torch.inference_mode():
        for i in chosen:
            model(torch.tensor([stream[i * TOKENS : (i + 1) * TOKENS]]))
    return {
        name: (module.weight.detach().numpy(), torch.cat(inputs[name]).numpy())
        for name, module in linears.items()
    }


def test_thresholds_are_the_quantile_over_the_column_norm(
    prepared: Path, dense: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    artifact = Artifact(prepared / "rsparse")
    assert len(dense) == 28
    assert set(artifact.info.linears) == set(dense)
    for name, (weight, x) in dense.items():
        norms = np.linalg.norm(weight, axis=0)
        scores = np.sort((np.abs(x) * norms).ravel())
        # The largest of the scores that are dropped.
        t = scores[scores.size - round(RHO * (1 - SPARSITY) * scores.size) - 1]
        thresholds = artifact.read(name).thresholds
        assert thresholds.dtype == torch.float32
        # The hidden states of the float32 model differ from float64's by some 1e-6.
        np.testing.assert_allclose(
            thresholds.numpy(), t / norms, rtol=1e-4, err_msg=name
        )
        kept = (np.abs(x) > thresholds.numpy()).mean()
        entry = artifact.info.linears[name]
        assert entry.kept_fraction == pytest.approx(kept, abs=1e-4)
        assert entry.kept_fraction == pytest.approx(0.475, abs=1e-4)


def test_factors_are_the_truncated_svd_with_the_true_shape(
    prepared: Path, dense: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    artifact = Artifact(prepared / "rsparse")
    for name, (weight, _) in dense.items():
        n, k = weight.shape
        rank = math.floor((1 - RHO) * (1 - SPARSITY) * n * k / (n + k))
        tensors = artifact.read(name)
        assert tensors.u is not None
        assert tensors.v is not None
        assert tensors.u.shape == (n, rank)
        assert tensors.v.shape == (rank, k)
        assert tensors.u.dtype == tensors.v.dtype == torch.bfloat16
        u, s, vh = np.linalg.svd(weight, full_matrices=False)
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
        found = tensors.u.double().numpy() @ tensors.v.double().numpy()
        # u and v are each rounded to bfloat16, 2^-9 of every element.
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 2**-8, name
        # Singular values go to u.
        np.testing.assert_allclose(
            np.linalg.norm(tensors.u.double().numpy(), axis=0), s[:rank], rtol=2**-8
        )
    ranks = {name.split(".")[-1]: e.rank for name, e in artifact.info.linears.items()}
    # k and v have 128 rows, q and o 384: grouped queries get what they can pay for.
    assert (ranks["k_proj"], ranks["q_proj"], ranks["down_proj"]) == (2, 4, 6)


def test_relative_error_is_that_of_the_formula(
    prepared: Path, dense: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    artifact = Artifact(prepared / "rsparse")
    for name, (weight, x) in dense.items():
        tensors = artifact.read(name)
        assert tensors.u is not None
        assert tensors.v is not None
        kept = np.abs(x) > tensors.thresholds.double().numpy()
        low = tensors.u.double().numpy() @ tensors.v.double().numpy()
        sparse = np.where(kept, x, 0) @ weight.T + np.where(kept, 0, x) @ low.T
        y = x @ weight.T
        expected = np.linalg.norm(sparse - y) / np.linalg.norm(y)
        found = artifact.info.linears[name].relative_error
        assert found == pytest.approx(expected, rel=1e-2), name
