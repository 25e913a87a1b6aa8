# SPDX-License-Identifier: Apache-2.0
"""Counters in a worker, read back through the exporter as Prometheus would see them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.metrics import exporter, layout
from vllm_rsparse.metrics.counters import Counters, Settings, open_counters
from vllm_rsparse.metrics.directory import CountsDirectory
from vllm_rsparse.metrics.exporter import Exporter
from vllm_rsparse.op import layers, observers, ops
from vllm_rsparse.op.backends import Backend
from vllm_rsparse.testing.cases import make_case

from .counted import K, Model, count, scrape


@pytest.fixture(autouse=True)
def _no_observer() -> Any:
    yield
    observers._observers.clear()


def test_nothing_before_the_first_step(tmp_path: Path) -> None:
    count(tmp_path, Model())
    assert scrape(Exporter(tmp_path)) == {}


def test_steps_by_route_and_tokens(tmp_path: Path) -> None:
    model = Model()
    count(tmp_path, model)
    for tokens in (1, 1, 2, 3, 9000, 0):
        model.step(torch.randn(tokens, K))
    samples = scrape(Exporter(tmp_path))
    buckets = "step_tokens_bucket"
    assert samples[buckets, "1.0", "sparse"] == 2
    assert samples[buckets, "2.0", "sparse"] == 3
    assert samples["step_tokens_count", "sparse"] == 3
    assert samples["step_tokens_sum", "sparse"] == 4
    assert samples[buckets, "2.0", "dense"] == 0
    assert samples[buckets, "4.0", "dense"] == 1
    assert samples[buckets, "8192.0", "dense"] == 1
    assert samples[buckets, "+Inf", "dense"] == 2
    assert samples["step_tokens_sum", "dense"] == 9003


@pytest.mark.parametrize("tokens", [1, 2])
def test_channels_and_bytes_by_kind(tmp_path: Path, tokens: int) -> None:
    model = Model()
    count(tmp_path, model)
    x = torch.randn(tokens, K)
    model.step(x)
    model.step(torch.randn(3, K))  # dense: nothing is chosen
    samples = scrape(Exporter(tmp_path))
    assert samples["sampled_tokens_total",] == tokens
    for kind, (seen, kept, read) in model.expected(x).items():
        assert samples["sampled_channels_total", kind] == seen
        assert samples["sampled_channels_kept_total", kind] == kept
        assert samples["sampled_read_bytes_total", kind] == read
    assert samples["dense_bytes", "q_proj"] == 2 * 32 * K * 4
    assert samples["dense_bytes", "up_proj"] == 16 * K * 4


def test_the_output_layer_counts_in_steps_of_the_layers(tmp_path: Path) -> None:
    model = Model()
    case = make_case(1, K, [40], [0], seed=9)
    number = layers.next_layer()
    layers.set_layer(case.operands.thresholds, number)
    counters = Counters(Settings(tmp_path, 1), 0)
    # A tied one is loaded before the layers.
    counters.register(number, ["lm_head"], case.operands, last=True)
    model.register(counters)
    observers.add_observer(counters.observe)

    def logits(x: torch.Tensor) -> None:
        ops.linear(x, *case.operands.schema_args(), 2, int(Backend.REFERENCE))

    logits(torch.randn(1, K))  # before any step: not counted
    model.step(torch.randn(2, K))
    x = torch.randn(1, K)  # one of the two is sampled from
    logits(x)
    # A graph is replayed: only the output layer is called from Python.
    logits(torch.randn(1, K))
    model.step(torch.randn(5, K))
    logits(torch.randn(5, K))
    samples = scrape(Exporter(tmp_path))
    assert samples["step_tokens_sum", "sparse"] == 2
    assert samples["step_tokens_sum", "dense"] == 5
    assert samples["sampled_channels_total", "lm_head"] == K
    kept = int((x.abs() > case.operands.thresholds).sum())
    assert samples["sampled_channels_kept_total", "lm_head"] == kept
    assert samples["dense_bytes", "lm_head"] == 40 * K * 4


def test_a_step_begins_with_the_layer_called_first(tmp_path: Path) -> None:
    # Loaded in another order, as weights are that are quantized while they load.
    model = Model()
    count(tmp_path, model, interval=2, reverse=True)
    x = torch.randn(1, K)
    model.step(x)  # sampled
    model.step(torch.randn(1, K))  # not, from its first layer on
    samples = scrape(Exporter(tmp_path))
    assert samples["step_tokens_count", "sparse"] == 2
    for kind, (seen, kept, _) in model.expected(x).items():
        assert samples["sampled_channels_total", kind] == seen
        assert samples["sampled_channels_kept_total", kind] == kept


def test_every_so_many_sparse_steps_are_sampled(tmp_path: Path) -> None:
    model = Model()
    count(tmp_path, model, interval=3)
    for _ in range(7):  # the 1st, 4th and 7th
        model.step(torch.randn(1, K))
        model.step(torch.randn(5, K))
    samples = scrape(Exporter(tmp_path))
    assert samples["sampled_tokens_total",] == 3
    assert samples["sampled_channels_total", "q_proj"] == 3 * 2 * K
    assert samples["step_tokens_count", "sparse"] == 7


def test_ranks_add_up_but_steps_count_once(tmp_path: Path) -> None:
    x = torch.randn(1, K)
    for rank in (1, 0):
        model = Model()
        count(tmp_path, model, rank=rank)
        model.step(x)
    samples = scrape(Exporter(tmp_path))
    assert samples["ranks",] == 2
    assert samples["step_tokens_count", "sparse"] == 1
    assert samples["sampled_tokens_total",] == 1
    assert samples["sampled_channels_total", "up_proj"] == 2 * K
    assert samples["dense_bytes", "up_proj"] == 2 * 16 * K * 4


def test_results_do_not_change(tmp_path: Path) -> None:
    model, x = Model(), torch.randn(2, K)
    before = model.step(x)
    count(tmp_path, model)
    assert torch.equal(model.step(x), before)


def test_compiled_graphs_call_the_op_with_the_registered_tensors(
    tmp_path: Path,
) -> None:
    # The layers are known by the number on their thresholds.
    model = Model()
    count(tmp_path, model)
    compiled = torch.compile(model.step, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        compiled(torch.randn(1, K))
    samples = scrape(Exporter(tmp_path))
    assert samples["step_tokens_count", "sparse"] == 3
    assert samples["sampled_channels_total", "k_proj"] == 3 * 2 * K


def test_tensors_of_no_registered_layer_are_ignored(tmp_path: Path) -> None:
    count(tmp_path, Model())
    Model().step(torch.randn(1, K))
    assert scrape(Exporter(tmp_path)) == {}


def test_swept_files_do_not_break_the_page(tmp_path: Path) -> None:
    model = Model()
    count(tmp_path, model)
    model.step(torch.randn(1, K))
    layout.counts_path(tmp_path, 0).unlink()
    assert scrape(Exporter(tmp_path)) == {}


def test_a_rank_that_cannot_count_serves_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Model(), torch.randn(1, K)
    expected = model.step(x)
    count(tmp_path, model)
    layout.counts_path(tmp_path, 0).mkdir()  # a file cannot be made here
    assert torch.equal(model.step(x), expected)
    model.step(x)
    assert caplog.text.count("rank 0 does not count") == 1


def test_rank_on_another_machine(tmp_path: Path) -> None:
    assert open_counters(Settings(tmp_path / "elsewhere", 1), rank=3) is None
    assert open_counters(None, rank=0) is None


def test_facts(write_artifact: Any, tmp_path: Path) -> None:
    linears = {f"layers.{i}.q_proj": (8, 16, 0, False) for i in range(2)}
    write_artifact(tmp_path, linears)
    collector = Exporter(tmp_path)
    collector.facts = exporter.facts(Artifact(tmp_path).info, "cpu", 4)
    samples = scrape(collector)
    assert samples["calibrated_kept_fraction", "q_proj"] == 0.5
    exported = [sample for family in collector.collect() for sample in family.samples]
    (info,) = [sample for sample in exported if sample.name == "vllm_rsparse_info"]
    assert info.labels["backend"] == "cpu"
    assert info.labels["max_sparse_tokens"] == "4"
    assert info.labels["artifact_sha256"] == Artifact(tmp_path).sha256


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_replays_are_counted() -> None:
    directory = CountsDirectory()  # in shared memory, as served
    path = directory.path
    model = Model("cuda")
    count(path, model)
    x = torch.randn(1, K, device="cuda")
    model.step(x)  # eager: mapped here, masks counted
    torch.cuda.synchronize()
    eager = scrape(Exporter(path))
    for kind, (seen, kept, read) in model.expected(x).items():
        assert eager["sampled_channels_total", kind] == seen
        assert eager["sampled_channels_kept_total", kind] == kept
        assert eager["sampled_read_bytes_total", kind] == read
    graphs = []
    for tokens in (1, 8):
        graph = torch.cuda.CUDAGraph()
        inputs = torch.randn(tokens, K, device="cuda")
        with torch.cuda.graph(graph):
            model.step(inputs)
        graphs.append(graph)
    assert scrape(Exporter(path)) == eager  # capturing runs nothing
    for _ in range(5):
        graphs[0].replay()
    graphs[1].replay()
    torch.cuda.synchronize()
    samples = scrape(Exporter(path))
    assert samples["step_tokens_count", "sparse"] == 1 + 5
    assert samples["step_tokens_sum", "dense"] == 8
    assert samples["sampled_tokens_total",] == 1  # not inside graphs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_that_cuda_cannot_map_serves_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Model("cuda"), torch.randn(1, K, device="cuda")
    expected = model.step(x)
    real = torch.from_file
    # What is locked already cannot be locked again, by any kernel.
    twice: list[torch.Tensor] = []

    def locked_once(*args: Any, **options: Any) -> torch.Tensor:
        twice.append(real(*args, **options).pin_memory())
        return twice[-1]

    monkeypatch.setattr(torch, "from_file", locked_once)
    count(tmp_path, model)
    assert torch.equal(model.step(x), expected)
    torch.cuda.synchronize()
    assert "rank 0 does not count: cuMemHostRegister" in caplog.text
