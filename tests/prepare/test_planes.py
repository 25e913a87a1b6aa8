# SPDX-License-Identifier: Apache-2.0
"""``prepare --weights int8-planes --bits``: two thresholds for every channel."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.artifact.schema import LinearEntry
from vllm_rsparse.artifact.tensors import Artifact, LinearTensors
from vllm_rsparse.errors import ArtifactError, PrepareError
from vllm_rsparse.evaluate.loading import SwitchableModel
from vllm_rsparse.formats.int8_planes import (
    INT8_PLANES,
    PLANES_WHILE_LOADING,
    encode_planes,
)
from vllm_rsparse.op import reference
from vllm_rsparse.op.operands import SparseOperands
from vllm_rsparse.prepare.calibration.linear import calibrate_linear
from vllm_rsparse.prepare.calibration.planes import kept_shares, threshold_ratio
from vllm_rsparse.prepare.pipeline import prepare
from vllm_rsparse.prepare.recipe.plan import LinearPlan

from .runs import options

planes_options = partial(
    options, sparsity=None, bits=4.2, weights="int8-planes", recipe="wina", rho=None
)


@pytest.fixture(scope="module")
def prepared(pyllama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("planes") / "out"
    prepare(planes_options(pyllama, output))
    return output


def test_the_artifact_has_two_thresholds_a_channel(prepared: Path) -> None:
    artifact = Artifact(prepared / "rsparse")
    assert artifact.planes == 2
    assert artifact.info.served_format == "int8-planes"
    assert artifact.info.bits_read == pytest.approx(4.2, abs=0.01)
    for name, entry in artifact.info.linears.items():
        first, second = artifact.read(name).thresholds
        assert (first <= second).all()
        assert entry.full_fraction is not None
        assert 0.02 < entry.full_fraction < 0.5 < entry.kept_fraction < 1
        part = artifact.read(name, columns=slice(64, 192)).thresholds
        assert torch.equal(part, torch.stack([first, second])[:, 64:192])
    config = json.loads((prepared / "config.json").read_text())
    assert config["quantization_config"]["weights"] == "int8-planes"


def _linear(tokens: int = 512) -> tuple[torch.Tensor, torch.Tensor, tuple]:
    scales = torch.rand(256).exp()
    x = torch.distributions.StudentT(4.0).sample((tokens, 256)) * scales
    weight = torch.randn(64, 256)
    stored = encode_planes(weight, 128, torch.bfloat16)
    return x, weight, (stored, INT8_PLANES.dequantise_planes(stored))


@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.6, 0.9])
def test_a_linear_reads_the_bits_of_its_plan(sparsity: float) -> None:
    x, _, (stored, planes) = _linear()
    made = calibrate_linear(
        planes, x, LinearPlan(sparsity, 1.0), 0, correction=sparsity == 0.6
    )
    assert 1 - made.entry.read_fraction == pytest.approx(sparsity, abs=5e-3)
    first, second = made.tensors.thresholds
    assert (first <= second).all()
    masks = [reference.kept_mask(x, row) for row in (first, second)]
    assert made.entry.kept_fraction == pytest.approx(masks[0].float().mean().item())
    assert made.entry.full_fraction == pytest.approx(masks[1].float().mean().item())
    # The definition of the op, on the same inputs.
    operands = SparseOperands.from_shards(stored, [made.tensors], [64], torch.float32)
    y, dense = reference.rsparse_linear(x, operands, None), x @ stored.dequantise().T
    error = (y - dense).norm() / dense.norm()
    assert made.entry.relative_error == pytest.approx(error.item(), rel=1e-3, abs=1e-6)


def test_both_planes_lose_less_than_the_first_alone_at_its_bits() -> None:
    """4.16 bits: every channel with four, or some with eight and others with none."""
    x, weight, (_, planes) = _linear(2048)
    exact = x @ weight.T
    four = (x @ planes[0].T - exact).norm()
    made = calibrate_linear(planes, x, LinearPlan(4 / 8.156, 1.0), 0)
    stored = encode_planes(weight, 128, torch.bfloat16)
    operands = SparseOperands.from_shards(stored, [made.tensors], [64], torch.float32)
    mixed = (reference.rsparse_linear(x, operands, None) - exact).norm()
    assert mixed < 0.6 * four


def test_shares_spend_the_bits() -> None:
    scores = torch.linspace(0, 1, 10_001)[1:]
    for read in (0.05, 0.3, 0.5, 0.8, 0.99):
        kept, full = kept_shares(scores, 4.0, read, 128)
        assert 0 <= full <= kept <= 1
        bits = 4.15625 * kept + 4 * full
        assert bits == pytest.approx(read * 8.15625, rel=1e-6)
        # A uniform score: the second threshold is four times the first.
        if full > 0 and kept < 1:
            assert 1 - full == pytest.approx(4 * (1 - kept), abs=2e-3)


def test_the_usual_ratio_is_that_of_four_bit_rounding() -> None:
    _, _, (_, planes) = _linear()
    assert 9 < threshold_ratio(planes) < 11


def test_evaluate_runs_what_is_served(prepared: Path, pyllama: Path) -> None:
    opened = PreparedDirectory.open(prepared)
    model = SwitchableModel(opened.checkpoint, torch.device("cpu"), torch.float32)
    model.use(opened.artifact)
    name = "model.layers.1.mlp.up_proj"
    linear = model.linears[name]
    x = torch.randn(1, 5, 384)
    linear.sparse = torch.tensor([[False, True, True, True, True]])
    out = linear(x)
    weights = load_file(pyllama / "model.safetensors")
    stored = PLANES_WHILE_LOADING.encode(weights[f"{name}.weight"])
    tensors = opened.artifact.read(name)
    sizes = [stored.n]
    operands = SparseOperands.from_shards(stored, [tensors], sizes, torch.float32)
    expected = reference.rsparse_linear(x[0], operands, None)
    expected[0] = x[0, 0] @ stored.dequantise().T
    torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-5)
    kept = [reference.kept_mask(x[0, 1:], row).sum() for row in tensors.thresholds]
    assert linear.kept == [int(count) for count in kept]


def test_the_default_recipe_allocates_bits(tiny_llama: Path, tmp_path: Path) -> None:
    info = prepare(
        planes_options(tiny_llama, tmp_path / "out", recipe="best", bits=3.2)
    )
    assert info.bits_read == pytest.approx(3.2, abs=0.02)
    method = info.provenance["method"]
    assert {"even", "sensitivity", "half of each"} <= method["trials"].keys()
    fractions = {round(entry.read_fraction, 3) for entry in info.linears.values()}
    assert len(fractions) > 1 or min(method["trials"], key=method["trials"].get) == (
        "even"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": None}, "takes --bits"),
        ({"sparsity": 0.5}, "takes --bits"),
        ({"bits": 9.0}, r"--bits must lie in \[1, 8\], got 9.0"),
        ({"bits": float("nan")}, "--bits must lie"),
        ({"weights": "fp8"}, "add --weights int8-planes"),
        ({"weights": "as-stored", "bits": None}, "--sparsity is missing"),
    ],
    ids=str,
)
def test_targets_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(PrepareError, match=message):
        planes_options(Path("model"), Path("out"), **changes)


@pytest.mark.parametrize("recipe", ["uniform", "greedy", "evolutionary"])
def test_recipes_that_do_not_allocate_bits(
    pyllama: Path, tmp_path: Path, recipe: str
) -> None:
    with pytest.raises(PrepareError, match=r"does not allocate bits.*wina.*best"):
        prepare(planes_options(pyllama, tmp_path / "out", recipe=recipe))


def _changed(prepared: Path, target: Path, **changes: Any) -> Artifact:
    """The artifact with other tensors, or without a key of its entries."""
    target.mkdir()
    info = json.loads((prepared / "rsparse" / "rsparse.json").read_text())
    if "drop" in changes:
        for entry in info["linears"].values():
            del entry[changes.pop("drop")]
            break
    tensors = load_file(prepared / "rsparse" / "rsparse.safetensors") | changes
    (target / "rsparse.json").write_text(json.dumps(info))
    save_file(tensors, target / "rsparse.safetensors")
    return Artifact(target)


def test_damaged_artifacts_are_refused(prepared: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    key = f"{name}.thresholds"
    whole = load_file(prepared / "rsparse" / "rsparse.safetensors")[key]
    artifact = _changed(prepared, tmp_path / "order", **{key: whole.flip(0)})
    with pytest.raises(ArtifactError, match="second plane is read where the first"):
        artifact.read(name)
    with pytest.raises(ArtifactError, match=r"thresholds is F32 \[384\], expected"):
        _changed(prepared, tmp_path / "one", **{key: whole[0].clone()})
    with pytest.raises(ArtifactError, match="lacks full_fraction"):
        _changed(prepared, tmp_path / "lacks", drop="full_fraction")


def test_an_entry_with_more_full_than_kept_is_refused(prepared: Path) -> None:
    entries: dict[str, LinearEntry] = Artifact(prepared / "rsparse").info.linears
    entry = next(iter(entries.values()))
    with pytest.raises(ValueError, match="more than kept_fraction"):
        replace(entry, full_fraction=0.99, kept_fraction=0.5)


def test_tensors_of_the_definition() -> None:
    """LinearTensors keeps both rows under one name."""
    rows = torch.rand(2, 8)
    assert LinearTensors(rows).named("n")["n.thresholds"] is rows
