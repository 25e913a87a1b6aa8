# SPDX-License-Identifier: Apache-2.0
"""Ranks that differ are refused before weights load; the nodes are named."""

import pickle
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from vllm_rsparse.errors import NodesDisagreeError
from vllm_rsparse.serving import agreement
from vllm_rsparse.serving.agreement import (
    Report,
    gather_reports,
    local_report,
    require_agreement,
)

LINEARS = {"model.layers.0.mlp.down_proj": (8, 16, 1, False)}


def test_report_names_the_node_and_the_versions(monkeypatch):
    monkeypatch.setenv("VLLM_HOST_IP", "10.0.0.7")
    report = local_report(artifact="abc")
    assert report.node == f"{socket.gethostname()} (10.0.0.7)"
    assert report.facts["artifact"] == "abc"
    assert set(report.facts) == {"vllm", "vllm-rsparse", "torch", "artifact"}


def test_equal_reports_pass_whatever_the_nodes_are_called():
    require_agreement([Report("a", {"torch": "1"}), Report("b", {"torch": "1"})])


def test_every_difference_is_named_with_its_nodes():
    reports = [
        Report("a", {"vllm": "1", "torch": "1", "artifact": "x"}),
        Report("a", {"vllm": "1", "torch": "1", "artifact": "x"}),
        Report("b", {"vllm": "2", "torch": "1", "artifact": "x"}),
        Report("c", {"vllm": "1", "torch": "1", "artifact": "none (gone)"}),
    ]
    with pytest.raises(NodesDisagreeError) as caught:
        require_agreement(reports)
    message = str(caught.value)
    assert "vllm: a, c has 1; b has 2." in message
    assert "artifact: a, b has x; c has none (gone)." in message
    assert "torch" not in message


def test_alone_nothing_is_gathered():
    mine = local_report()
    assert gather_reports(mine, None) == [mine]


RANK = """
import sys
import torch.distributed as dist
from vllm_rsparse.errors import NodesDisagreeError
from vllm_rsparse.serving.agreement import *
rank, rendezvous = int(sys.argv[1]), sys.argv[2]
method = f"file://{rendezvous}"
dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2)
mine = Report(f"node-{rank}", {"artifact": ("same", "other")[rank]})
try:
    require_agreement(gather_reports(mine, dist.group.WORLD))
except NodesDisagreeError as error:
    print(error)
"""


def test_all_ranks_refuse_when_one_differs(tmp_path):
    """None may go on to wait for a rank that has left."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert said[0] == said[1]
    assert "node-0 has same; node-1 has other" in said[0]


@pytest.fixture
def config(tmp_path, write_artifact):
    pytest.importorskip("vllm")
    from vllm_rsparse.serving.config import RSparseConfig

    write_artifact(tmp_path / "rsparse", LINEARS)
    config = RSparseConfig.from_config({"artifact": "rsparse", "max_sparse_tokens": 1})
    config.maybe_update_config(str(tmp_path))
    return config


def test_config_refuses_to_arrive_under_other_versions(config, monkeypatch):
    sent = pickle.dumps(config)
    pickle.loads(sent)
    theirs = agreement.installed
    monkeypatch.setattr(
        agreement, "installed", lambda p: "9.9" if p == "vllm" else theirs(p)
    )
    monkeypatch.setattr(socket, "gethostname", lambda: "node-b")
    with pytest.raises(NodesDisagreeError, match=r"vllm: .*node-b.* has 9\.9"):
        pickle.loads(sent)


class _Linear:
    """Stands for a layer: no rank may get as far as building one."""


@pytest.fixture
def ranks(config, monkeypatch):
    """Call with what the other rank reports: this process then is one of two ranks."""
    from vllm_rsparse.serving import config as config_module
    from vllm_rsparse.serving import served as module

    def become(**theirs):
        def gather(mine, group):
            assert group == "both"
            return [mine, Report("node-b", {**mine.facts, **theirs})]

        monkeypatch.setattr(module, "_world_group", lambda: "both")
        monkeypatch.setattr(module, "gather_reports", gather)
        monkeypatch.setattr(config_module, "LinearBase", _Linear)
        return pickle.loads(pickle.dumps(config))

    return become


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("artifact", "0" * 64),
        ("artifact", "none (no such file)"),
        ("max_sparse_tokens", "2"),
        ("backend", "triton"),
        ("vllm-rsparse", "0.0.1"),
    ],
)
def test_first_layer_is_refused_where_another_rank_differs(ranks, fact, value):
    config = ranks(**{fact: value})
    with pytest.raises(NodesDisagreeError, match=f"{fact}: .*node-b has ") as caught:
        config.get_quant_method(_Linear(), "model.layers.0.mlp.down_proj")
    assert value in str(caught.value)


def test_rank_without_its_artifact_tells_the_others(ranks, tmp_path):
    config = ranks(artifact="good")
    (tmp_path / "rsparse" / "rsparse.json").unlink()
    with pytest.raises(NodesDisagreeError, match=r"has none \(.*no artifact at"):
        config.get_quant_method(_Linear(), "model.layers.0.mlp.down_proj")


def test_draft_model_is_loaded_by_some_ranks_only_and_not_compared(monkeypatch):
    pytest.importorskip("vllm")
    from vllm_rsparse.serving import served as module

    draft, served = object(), object()
    state = SimpleNamespace(
        model_parallel_is_initialized=lambda: True,
        get_world_group=lambda: SimpleNamespace(world_size=2, cpu_group="both"),
    )
    monkeypatch.setattr(module, "parallel_state", state)
    engine = SimpleNamespace(
        speculative_config=SimpleNamespace(draft_model_config=draft)
    )
    monkeypatch.setattr(module, "get_current_vllm_config", lambda: engine)
    engine.model_config = served
    assert module._world_group() == "both"
    engine.model_config = draft
    assert module._world_group() is None
