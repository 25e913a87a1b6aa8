# SPDX-License-Identifier: Apache-2.0
"""Interrupted runs: what is kept, and that they resume from it."""

import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.pipeline import prepare
from vllm_rsparse.prepare.store import run_store
from vllm_rsparse.prepare.store.run_store import Key, RunStore

from .runs import contents, short

LAYERS = 4  # of the reference model
CORRECTIONS = ("plain", "corrected")


@pytest.fixture(scope="module")
def undisturbed(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    """Both files of the artifact, by recipe."""
    folder = tmp_path_factory.mktemp("whole")
    result = {}
    for recipe in ("best", "greedy"):
        prepare(short(tiny_llama, folder / recipe, recipe=recipe))
        result[recipe] = contents(folder / recipe)
    assert sorted(path.name for path in folder.iterdir()) == ["best", "greedy"]
    return result


def numbered(stage: str, *positions: int) -> list[str]:
    return [f"{stage}.{position}" for position in positions]


TRIED = [
    *("greedy", "greedy, corrected", "sensitivity", "sensitivity, corrected"),
    *("half of each", "half of each, corrected"),
    *("evened", "without factors"),  # of the best so far, whichever it is
]
FOUND = [
    *numbered("entering", 0, 1, 2, 3, 4),
    *numbered("sensitivity", 3, 2, 1, 0),
    *numbered("greedy", 0, 1, 2, 3),
    *(
        f"ranks.{kind}.0.5.{i}"
        for i in range(LAYERS)
        for kind in ("plain", "corrected")
    ),
    *(f"divergence.0.5.{candidate}" for candidate in TRIED),
    *numbered("calibrated.0.5", 0, 1, 2, 3),
]


@pytest.mark.parametrize(
    ("recipe", "killed_after", "seconds", "found_again"),
    [
        ("best", "entering.2", 0, []),
        # The gradient that leaves layer 2 was not kept any more.
        ("best", "sensitivity.2", 0, ["sensitivity.2"]),
        ("best", "greedy.1", 0, []),
        ("best", "ranks.corrected.0.5.1", 0, []),
        ("best", "divergence.0.5.sensitivity", 0, []),
        ("best", "divergence.0.5.evened", 0, []),
        ("best", "calibrated.0.5.2", 0, ["calibrated.0.5.2"]),
        # No state was due since the gradient by what leaves the last layer, or the
        # hidden states that enter the first.
        ("best", "sensitivity.1", 1e9, numbered("sensitivity", 3, 2, 1)),
        ("best", "calibrated.0.5.2", 1e9, numbered("calibrated.0.5", 0, 1, 2)),
        ("greedy", "calibrated.0.5.1", 0, ["calibrated.0.5.1"]),
    ],
)
def test_a_killed_run_resumes(
    tiny_llama: Path,
    tmp_path: Path,
    undisturbed: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    killed_after: str,
    seconds: float,
    found_again: list[str],
) -> None:
    monkeypatch.setattr(run_store, "STATE_SECONDS", seconds)
    put, record = RunStore.put, RunStore.record
    kept: list[str] = []

    def killed(store: RunStore, key: Key) -> None:
        name = re.sub(r"0\.5\..*, (evened|without factors)$", r"0.5.\1", str(key))
        kept.append(name)
        if name == killed_after and kept.count(name) == 1:
            # As a kill in the middle of the next file would.
            (store.directory / "next.partial").write_bytes(b"half")
            raise KeyboardInterrupt

    def counted_put(
        self: RunStore, key: Key, tensors: Mapping[str, Tensor], note: Any = None
    ) -> None:
        put(self, key, tensors, note)
        killed(self, key)

    def counted_record(self: RunStore, results: Mapping[Key, Any]) -> None:
        record(self, results)
        for key in results:
            killed(self, key)

    monkeypatch.setattr(RunStore, "put", counted_put)
    monkeypatch.setattr(RunStore, "record", counted_record)
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(short(tiny_llama, output, recipe=recipe))
    assert kept[-1] == killed_after
    assert [path.name for path in tmp_path.iterdir()] == ["out.search"]

    first_run = len(kept)
    prepare(short(tiny_llama, output, recipe=recipe))
    assert contents(output) == undisturbed[recipe]
    again = [key for key in kept[first_run:] if key in FOUND]
    assert again == found_again + FOUND[FOUND.index(killed_after) + 1 :]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run ``best`` until it has found something in the last layer."""

    def killed(self: RunStore) -> bool:
        raise KeyboardInterrupt

    def run(settings: PrepareOptions) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(RunStore, "state_due", killed)
            with pytest.raises(KeyboardInterrupt):
                prepare(settings)
        assert (tmp_path / "out.search" / "sensitivity.3.safetensors").exists()

    return run


def test_what_another_run_left_is_not_used(
    tiny_llama: Path,
    tmp_path: Path,
    undisturbed: dict[str, dict[str, bytes]],
    interrupt: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "out"
    interrupt(short(tiny_llama, output, recipe="best", seed=1))
    # A recipe that keeps nothing does not touch it.
    prepare(short(tiny_llama, output, recipe="wina"))
    assert (tmp_path / "out.search").exists()
    shutil.rmtree(output)
    with caplog.at_level(logging.WARNING):
        prepare(short(tiny_llama, output, recipe="best"))
    assert "out.search is from a run that differs in --seed, calib" in caplog.text
    assert contents(output) == undisturbed["best"]
    assert not (tmp_path / "out.search").exists()


def test_a_config_that_was_edited_meanwhile(
    tiny_llama: Path,
    tmp_path: Path,
    interrupt: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The results so far belong to the model as it was."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    settings = short(model, tmp_path / "out", recipe="best")
    interrupt(settings)
    config = model / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"rope_theta": 10000.0', '"rope_theta": 5e5'))
    assert config.read_text() != before
    with caplog.at_level(logging.WARNING):
        prepare(settings)
    assert "from a run that differs in config.json: starting again" in caplog.text
    prepare(short(model, tmp_path / "fresh", recipe="best"))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
