# SPDX-License-Identifier: Apache-2.0
"""The output layer as it is served, in scores, trials, artifact and `evaluate`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.artifact.reads import head_reads
from vllm_rsparse.artifact.schema import ArtifactInfo
from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.errors import CheckpointError, PrepareError
from vllm_rsparse.evaluate.loading import SwitchableModel
from vllm_rsparse.evaluate.measure import measure
from vllm_rsparse.formats.fp8 import FP8_WHILE_LOADING
from vllm_rsparse.formats.int8_planes import PLANES_WHILE_LOADING
from vllm_rsparse.formats.load_time import LoadTimeFormat
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.language_model import LanguageModel
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.calibration.head import calibrate_head
from vllm_rsparse.prepare.calibration.loss import divergence, text_losses
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.report import summary
from vllm_rsparse.prepare.run import Run
from vllm_rsparse.prepare.search.sensitivity import _output_gradient
from vllm_rsparse.prepare.store.run_store import RunStore

from .runs import run as prepare_run

SCALING = 16.0  # a power of two: scaling by it is exact
LAYERS = 2


def _prepare(
    model: Path, output: Path, **changes: Any
) -> tuple[ArtifactInfo, Artifact]:
    settings = {"recipe": "best", "rho": None, "seed": 0}
    info = prepare_run(model, output, **(settings | changes))
    return info, Artifact(output / "rsparse")


def _write(source: Path, target: Path, embedding: float, **changes: object) -> Path:
    """A model's first layers, with its embedding multiplied."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= embedding
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, **changes}
    (target / "config.json").write_text(json.dumps(config))
    for file in source.glob("tokenizer*"):
        shutil.copy(file, target)
    return target


def test_the_same_function_with_scaled_logits_is_prepared_alike(
    tiny_llama: Path, tmp_path: Path
) -> None:
    llama = _write(tiny_llama, tmp_path / "llama", 1.0)
    granite = _write(
        tiny_llama,
        tmp_path / "granite",
        SCALING,  # the head is tied to it
        architectures=["GraniteForCausalLM"],
        model_type="granite",
        embedding_multiplier=1 / SCALING,
        logits_scaling=SCALING,
        attention_multiplier=0.125,  # one over the root of the head's 64 channels
        residual_multiplier=1.0,
    )
    plain, artifact = _prepare(llama, tmp_path / "rs-llama")
    scaled, other = _prepare(granite, tmp_path / "rs-granite")
    method = plain.provenance["method"]
    assert scaled.provenance["method"]["trials"] == pytest.approx(method["trials"])
    assert scaled.provenance["method"]["correction"] == method["correction"]
    for name, entry in plain.linears.items():
        assert scaled.linears[name].sparsity == pytest.approx(entry.sparsity)
        mine, theirs = artifact.read(name), other.read(name)
        assert theirs.thresholds.tolist() == pytest.approx(mine.thresholds.tolist())


@pytest.fixture(scope="module")
def small(pyllama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(pyllama, tmp_path_factory.mktemp("models") / "small", 1.0)


@torch.inference_mode()
def head_divergence(
    model: SwitchableModel,
    windows: Tensor,
    prefix: int,
    load_time: LoadTimeFormat,
    thresholds: Tensor | None,
) -> float:
    """KL of the logits behind a dense prefix, by the definition."""
    states = model.model.model(windows).last_hidden_state[:, prefix:-1].flatten(0, 1)
    weight = model.head.weight
    exact = (states @ weight.T).log_softmax(-1)
    if thresholds is not None:
        states = torch.where(states.abs() > thresholds, states, 0)
    logs = (states @ load_time.round_trip(weight).T).log_softmax(-1)
    return (exact.exp() * (exact - logs)).sum(-1).mean().item()


def test_only_the_head_is_sparse(small: Path, tmp_path: Path) -> None:
    options = {"sparsity": 0.0, "recipe": "teal", "head": "fp8", "head_sparsity": 0.4}
    info, artifact = _prepare(small, tmp_path / "out", **options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["head_sparsity"] == 0.4
    assert info.sparse_head == artifact.info.sparse_head
    assert info.sparse_head.shape == (4096, 384)
    assert info.sparse_head.kept_fraction == pytest.approx(0.6, abs=1e-3)
    assert info.achieved_sparsity == 0.0
    assert f"{info.provenance['head']['kl_divergence']:.4f} nats" in summary(info)

    # What `evaluate` measures, by the definition and apart from it.
    prepared = PreparedDirectory.open(tmp_path / "out")
    model = SwitchableModel(prepared.checkpoint, torch.device("cpu"), torch.float32)
    windows = torch.randint(0, 4096, (2, 20))
    (loss,) = measure(model, [prepared], windows, 5)
    thresholds = artifact.read("lm_head").thresholds
    expected = head_divergence(model, windows, 5, FP8_WHILE_LOADING, thresholds)
    assert loss.kl_divergence == pytest.approx(expected, rel=1e-3)
    assert loss.by_kind["lm_head"] == pytest.approx(0.4, abs=0.1)
    assert loss.achieved_sparsity == 0.0


def test_a_head_in_planes(small: Path, tmp_path: Path) -> None:
    info, _ = _prepare(
        small, tmp_path / "out", sparsity=0.0, recipe="teal", head="int8-planes"
    )
    rounded = tmp_path / "fp8"
    fp8, _ = _prepare(small, rounded, sparsity=0.0, recipe="teal", head="fp8")
    lost = {one.head: one.provenance["head"]["kl_divergence"] for one in (info, fp8)}
    # Eight bits instead of three of mantissa: a tenth of the error, squared.
    assert 0 < lost["int8-planes"] < 0.1 * lost["fp8"]
    n, k = info.provenance["head"]["shape"]
    # Codes of eight bits, and 2.5 bytes for every 128 of them.
    assert head_reads(info).dense == n * k * (1 + 2.5 / 128)

    prepared = PreparedDirectory.open(tmp_path / "out")
    model = SwitchableModel(prepared.checkpoint, torch.device("cpu"), torch.float32)
    windows = torch.randint(0, 4096, (1, 12))
    (loss,) = measure(model, [prepared], windows, 2)
    expected = head_divergence(model, windows, 2, PLANES_WHILE_LOADING, None)
    assert loss.kl_divergence == pytest.approx(expected, rel=1e-2)


def test_a_head_in_planes_is_not_sparse(small: Path, tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"--head-sparsity 0.3: .* use --head fp8"):
        _prepare(
            small, tmp_path / "out", sparsity=0.5, head="int8-planes", head_sparsity=0.3
        )


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"vocab_size": 4099}, r"is \[4099, 384\]: --head int8-planes"),
        ({"hidden_size": 84}, r"is \[4096, 84\]: --head int8-planes"),
    ],
)
def test_a_head_that_planes_do_not_fit_is_refused_at_once(
    small: Path, tmp_path: Path, changes: dict[str, int], found: str
) -> None:
    model = shutil.copytree(small, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))
    checkpoint, cpu = Checkpoint(model), torch.device("cpu")
    planes = StreamedModel(
        checkpoint, cpu, torch.float32, head_load_time=PLANES_WHILE_LOADING
    )
    with pytest.raises(CheckpointError, match=rf"{found}.* use --head fp8"):
        planes.check_head()


def test_a_prompt_uses_the_whole_quantized_head(small: Path, tmp_path: Path) -> None:
    options = {"sparsity": 0.0, "recipe": "teal", "head": "fp8", "head_sparsity": 0.4}
    _prepare(small, tmp_path / "out", **options)
    prepared = PreparedDirectory.open(tmp_path / "out")
    model = SwitchableModel(prepared.checkpoint, torch.device("cpu"), torch.float32)
    windows = torch.randint(0, 4096, (1, 8))
    sparse = torch.zeros(1, 8, dtype=torch.bool)
    sparse[0, 4:] = True
    model.use(prepared.artifact)
    logits = model.logits(windows, 0, sparse)[0]
    with torch.inference_mode():
        states = model.model.model(windows).last_hidden_state[0]
        whole = states @ FP8_WHILE_LOADING.round_trip(model.head.weight).T
    torch.testing.assert_close(logits[:4], whole[:4], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[4:], whole[4:], rtol=1e-2, atol=1e-2)


class Served:
    """The output layer of a run, in plain PyTorch."""

    def __init__(self, run: Run, hidden: Tensor) -> None:
        tensors = load_file(run.model.checkpoint.directory / "model.safetensors")
        self.weight = tensors["model.embed_tokens.weight"].float()
        self.rounded = FP8_WHILE_LOADING.round_trip(self.weight)
        self._norm = tensors["model.norm.weight"].float()
        states = self.states(hidden[:, run.dense_prefix :].flatten(0, 1))
        scores = (states.abs() * self.rounded.norm(dim=0)).flatten().sort().values
        dropped = round(run.head_sparsity * len(scores))
        self._least = scores[dropped - 1 : dropped + 1].mean()

    def states(self, hidden: Tensor) -> Tensor:
        mean = hidden.pow(2).mean(-1, keepdim=True)
        return hidden * (mean + 1e-6).rsqrt() * self._norm

    def __call__(self, hidden: Tensor) -> Tensor:
        states = self.states(hidden)
        kept = states.abs() * self.rounded.norm(dim=0) > self._least
        return torch.where(kept, states, 0) @ self.rounded.T


@pytest.fixture
def run(small: Path, tmp_path: Path) -> Run:
    checkpoint, cpu = Checkpoint(small), torch.device("cpu")
    model = StreamedModel(
        checkpoint, cpu, torch.float32, head_load_time=FP8_WHILE_LOADING
    )
    windows = torch.randint(0, 4096, (2, 10))
    store = RunStore(tmp_path / "store", {})
    return Run(model, (), windows, 3, 0, store, head_sparsity=0.4)


def test_losses_of_candidates_are_of_the_head_that_is_served(run: Run) -> None:
    hidden = torch.randn(2, 10, 384)
    served = Served(run, hidden)
    logs = served(hidden[:, 3:]).log_softmax(-1)
    exact = (served.states(hidden[:, 3:]) @ served.weight.T).log_softmax(-1)
    expected = (exact.exp() * (exact - logs)).sum(-1).mean().item()
    assert divergence(run, hidden, hidden) == pytest.approx(expected, rel=1e-4)
    head = calibrate_head(run, hidden)
    assert head is not None
    assert head.divergence == pytest.approx(expected, rel=1e-4)
    labels = run.windows[:, 4:, None]
    nll = -logs[:, :-1].gather(-1, labels).mean().item()
    assert text_losses(run, [hidden]) == pytest.approx([nll], rel=1e-4)


def test_scores_are_gradients_of_the_head_that_is_served(run: Run) -> None:
    hidden = torch.randn(2, 10, 384)
    served, generator = Served(run, hidden), torch.Generator().manual_seed(run.seed)
    found = _output_gradient(run, hidden)
    assert not found[:, :3].any()
    for row in range(2):
        h = hidden[row, 3:].requires_grad_()
        logs = served(h).log_softmax(-1)
        labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        (expected,) = torch.autograd.grad(-logs.gather(-1, labels).sum(), h)
        torch.testing.assert_close(found[row, 3:], expected, rtol=1e-4, atol=1e-6)


def test_the_head_of_the_base_needs_no_calibration(run: Run) -> None:
    plain = StreamedModel(run.model.checkpoint, run.model.device, torch.float32)
    hidden = torch.randn(2, 10, 384)
    unchanged = replace(run, model=plain, head_sparsity=0.0)
    assert calibrate_head(unchanged, hidden) is None
    assert divergence(unchanged, hidden, hidden) == 0.0


def test_a_head_that_the_checkpoint_quantized_stays(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "head_is_quantized", True)
    with pytest.raises(CheckpointError, match=r"leave out --head and --head-sparsity"):
        _prepare(small, tmp_path / "out", head_sparsity=0.3)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_share_is_required(value: float) -> None:
    with pytest.raises(PrepareError, match=r"--head-sparsity must lie in \[0, 1\)"):
        PrepareOptions("x", Path("y"), 0.5, head_sparsity=value)
