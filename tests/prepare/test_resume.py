# SPDX-License-Identifier: Apache-2.0
"""Interrupted runs of recipes that propagate: what is kept, and going on from there."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_rsparse.errors import PrepareError
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.pipeline import prepare
from vllm_rsparse.prepare.store import snapshots
from vllm_rsparse.prepare.store.journal import Journal
from vllm_rsparse.prepare.store.snapshots import Snapshots

TEXT = Path(json.decoder.__file__)
LAYERS = 4  # of the reference model


def options(model: Path, output: Path, recipe: str, seed: int = 0) -> PrepareOptions:
    return PrepareOptions(
        str(model), output, 0.5, (TEXT,), samples=2, tokens=40, device="cpu",
        recipe=recipe, seed=seed,
    )  # fmt: skip


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "rsparse").iterdir()}


@pytest.fixture(scope="module")
def undisturbed(
    pyllama: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    """Both files of the artifact, by recipe."""
    folder = tmp_path_factory.mktemp("whole")
    result = {}
    for recipe in ("best", "greedy"):
        prepare(options(pyllama, folder / recipe, recipe))
        result[recipe] = contents(folder / recipe)
    assert sorted(path.name for path in folder.iterdir()) == ["best", "greedy"]
    return result


def numbered(name: str, *positions: int) -> list[str]:
    return [f"{name}.{position}" for position in positions]


TRIED = [
    *("greedy", "greedy, corrected", "sensitivity", "sensitivity, corrected"),
    *("half of each", "half of each, corrected", "half evenly", "without factors"),
]
FOUND = [
    *numbered("entering", 0, 1, 2, 3, 4),
    *numbered("sensitivity", 3, 2, 1, 0),
    *numbered("measured", 0, 1, 2, 3),  # in the journal, as the divergences are
    *numbered("ranks.plain", 0, 1, 2, 3),
    *numbered("ranks.corrected", 0, 1, 2, 3),
    *(f"measured.divergence {way}" for way in TRIED),
    *numbered("calibrated", 0, 1, 2, 3),
]


@pytest.mark.parametrize(
    ("recipe", "killed_after", "seconds", "found_again"),
    [
        ("best", "entering.2", 0, []),
        # The gradient that leaves layer 2 was not kept any more.
        ("best", "sensitivity.2", 0, ["sensitivity.2"]),
        ("best", "measured.1", 0, []),
        ("best", "ranks.plain.1", 0, []),
        ("best", "measured.divergence sensitivity", 0, []),
        ("best", "measured.divergence half evenly", 0, []),
        ("best", "calibrated.2", 0, ["calibrated.2"]),
        # No state was due since the gradient by what leaves the last layer, or the
        # hidden states that enter the first.
        ("best", "sensitivity.1", 1e9, numbered("sensitivity", 3, 2, 1)),
        ("best", "calibrated.2", 1e9, numbered("calibrated", 0, 1, 2)),
        ("greedy", "calibrated.1", 0, ["calibrated.1"]),
    ],
)
def test_a_killed_run_goes_on(
    pyllama: Path,
    tmp_path: Path,
    undisturbed: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    killed_after: str,
    seconds: float,
    found_again: list[str],
) -> None:
    monkeypatch.setattr(snapshots, "STATE_SECONDS", seconds)
    put, note = Snapshots.put, Journal.note
    kept: list[str] = []

    def counted_put(
        self: Snapshots, key: str, tensors: Mapping[str, Tensor], note: Any = None
    ) -> None:
        put(self, key, tensors, note)
        kept.append(key)
        if key == killed_after and kept.count(key) == 1:
            # As a kill in the middle of the next file would.
            (self.directory / "next.partial").write_bytes(b"half")
            raise KeyboardInterrupt

    def counted_note(self: Journal, results: Mapping[str, Any]) -> None:
        note(self, results)
        kept.extend(f"measured.{key}" for key in results)
        if kept[-1] == killed_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Snapshots, "put", counted_put)
    monkeypatch.setattr(Journal, "note", counted_note)
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(options(pyllama, output, recipe))
    assert kept[-1] == killed_after
    left = {path.name for path in tmp_path.iterdir()}
    assert "out.search" in left
    assert left <= {"out.search", "out.search.jsonl"}

    first_run = len(kept)
    prepare(options(pyllama, output, recipe))
    assert contents(output) == undisturbed[recipe]
    again = [key for key in kept[first_run:] if key in FOUND]
    assert again == found_again + FOUND[FOUND.index(killed_after) + 1 :]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_run_left_is_not_used(
    pyllama: Path,
    tmp_path: Path,
    undisturbed: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "out"

    def killed(self: Snapshots) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Snapshots, "state_due", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(options(pyllama, output, "best", seed=1))
    assert (tmp_path / "out.search" / "sensitivity.3.safetensors").exists()
    # A recipe that keeps nothing does not touch it.
    prepare(options(pyllama, output, "wina"))
    assert (tmp_path / "out.search").exists()
    shutil.rmtree(output)
    with caplog.at_level(logging.WARNING):
        prepare(options(pyllama, output, "best"))
    assert "out.search is from a run with another model, text or options" in caplog.text
    assert contents(output) == undisturbed["best"]
    assert not (tmp_path / "out.search").exists()


def test_tensors_come_back(tmp_path: Path) -> None:
    kept = {
        "half": torch.randn(3, 5).bfloat16(),
        "columns": torch.randn(3, 5)[:, ::2],
        "counts": torch.arange(4),
        "none": torch.empty(0, 2),
    }
    one = Snapshots(tmp_path / "s", {"a": 1})
    assert "key" not in one
    assert not one.directory.exists()
    one.put("key", {"half": torch.zeros(1)}, "old")
    one.put("key", kept, {"b": [0.1, None]})
    one.put("empty", {})
    with Snapshots(tmp_path / "s", {"a": 1}) as other:
        assert "key" in other
        tensors, note = other.get("key")
        assert tensors.keys() == kept.keys()
        assert all(torch.equal(tensors[name], kept[name]) for name in kept)
        tensors["half"].zero_()  # the file stays as it is
        assert torch.equal(other.get("key")[0]["half"], kept["half"])
        assert note == {"b": [0.1, None]}
        assert other.get("empty") == ({}, None)
    assert not other.directory.exists()


def test_errors_name_the_file_and_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Snapshots(tmp_path / "s", {})
    one.put("key", {"x": torch.ones(8)})
    with pytest.raises(PrepareError, match=r"key2.* cannot be read .*remove .*/s and"):
        one.get("key2")
    path = tmp_path / "s" / "key.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PrepareError, match=r"key\.safetensors: cannot be read"):
        one.get("key")
    with pytest.raises(PrepareError, match=r"/s: .* takes 1\d{18} bytes.*are free"):
        one.require(10**18)
    one.require(1)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots, "save_file", full)
    with pytest.raises(PrepareError, match=r"other\.safe.* No space left .*make room"):
        one.put("other", {})
    assert "other" not in one
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").touch()
    with pytest.raises(PrepareError, match="not of its making"):
        Snapshots(foreign, {}).put("key", {})
    assert [file.name for file in foreign.iterdir()] == ["thesis.txt"]
