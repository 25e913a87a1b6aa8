# SPDX-License-Identifier: Apache-2.0
"""The store that runs resume from: results come back, or are absent as a whole."""

import logging
from concurrent.futures import Future
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
import torch

from vllm_rsparse.errors import PrepareError
from vllm_rsparse.prepare.store import background, files
from vllm_rsparse.prepare.store.background import AHEAD
from vllm_rsparse.prepare.store.run_store import RESULTS, Key, RunStore

KEY = Key("stage", 0)


def test_tensors_come_back(tmp_path: Path) -> None:
    kept = {
        "half": torch.randn(3, 5).bfloat16(),
        "columns": torch.randn(3, 5)[:, ::2],
        "counts": torch.arange(4),
        "none": torch.empty(0, 2),
    }
    store = RunStore(tmp_path / "s", {"a": 1})
    assert KEY not in store
    assert not store.directory.exists()
    store.put(KEY, {"half": torch.zeros(1)}, "old")
    store.put(KEY, kept, {"b": [0.1, None]})
    store.close()
    with RunStore(tmp_path / "s", {"a": 1}) as other:
        assert KEY in other
        assert Key("stage", 1) not in other
        tensors, note = other.get(KEY)
        assert tensors.keys() == kept.keys()
        assert all(torch.equal(tensors[name], kept[name]) for name in kept)
        tensors["half"].zero_()  # the file stays as it is
        assert torch.equal(other.get(KEY)[0]["half"], kept["half"])
        assert note == {"b": [0.1, None]}
    assert not other.directory.exists()


def test_tensors_may_change_after_they_were_put(tmp_path: Path) -> None:
    with RunStore(tmp_path / "s", {}) as store:
        x = torch.zeros(1000)
        for index in range(3 * AHEAD):
            store.put(Key("stage", index), {"x": x}, index)
            x += 1
            assert Key("stage", index) in store
        for index in range(3 * AHEAD):
            tensors, note = store.get(Key("stage", index))
            assert note == index
            assert torch.equal(tensors["x"], torch.full((1000,), float(index)))


def test_tensors_can_be_read_before_they_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, sync = Event(), background.os.fsync

    def slow(descriptor: int) -> None:
        assert disk.wait(60)
        sync(descriptor)

    store = RunStore(tmp_path / "s", {})
    store.record({Key("stage", "x"): 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(background.os, "fsync", slow)
        for index in range(3 * AHEAD):
            store.put(Key("stage", index), {"x": torch.full((5,), float(index))})
        for index in range(3 * AHEAD):
            assert store.get(Key("stage", index))[0]["x"].tolist() == [index] * 5
        assert not list(store.directory.glob("*.safetensors"))
        disk.set()
        store.close()
    names = [f"stage.{index}.safetensors" for index in range(3 * AHEAD)]
    assert sorted(x.name for x in store.directory.glob("*.safetensors")) == names
    assert store.get(Key("stage", 1))[0]["x"].tolist() == [1] * 5


def test_an_interrupted_run_finishes_what_it_put(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "s", {})
    for index in range(AHEAD):
        store.put(Key("stage", index), {"x": torch.ones(1 << 20)})
    store.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    names = [f"stage.{index}.safetensors" for index in range(AHEAD)]
    assert sorted(file.name for file in store.directory.glob("stage*")) == names


# A resumed run takes a state for proof of the results that were put before it.
RESULT, STATE = Key("result", 0), Key("state", 0)


@pytest.fixture
def syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Future[None]]:
    """What to wait for before a file is on disk, by its name."""
    waiting: dict[str, Future[None]] = {f"{RESULT}.partial": Future()}
    sync = background._sync

    def slow(path: Path, written: Future[None]) -> None:
        if path.name in waiting:
            waiting[path.name].result(60)
        sync(path, written)

    monkeypatch.setattr(background, "_sync", slow)
    return waiting


def _named(store: RunStore) -> list[str]:
    return sorted(file.name for file in store.directory.glob("*.safetensors"))


def test_after_a_file_that_fails_no_later_one_has_a_name(
    tmp_path: Path, syncs: dict[str, Future[None]]
) -> None:
    store = RunStore(tmp_path / "s", {})
    for key in (KEY, RESULT, STATE):
        store.put(key, {"x": torch.ones(8)})
    full = PrepareError("result: No space left on device")
    syncs["result.0.partial"].set_exception(full)
    with pytest.raises(PrepareError, match="No space left"):
        store.require(1)
    store.__exit__(PrepareError, full, None)
    assert _named(store) == ["stage.0.safetensors"]


def test_files_get_their_names_in_order(
    tmp_path: Path,
    syncs: dict[str, Future[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = RunStore(tmp_path / "s", {})
    for key in (RESULT, STATE):
        store.put(key, {"x": torch.ones(8)})
    Timer(0.1, syncs["result.0.partial"].set_result, (None,)).start()
    named, rename = [], background.os.replace

    def noted(source: Path, target: Path) -> None:
        named.append(target.name)
        rename(source, target)

    monkeypatch.setattr(background.os, "replace", noted)
    store.put(STATE, {"x": torch.zeros(8)})
    assert named == ["result.0.safetensors", "state.0.safetensors"]
    store.close()


def test_a_wait_that_is_interrupted_loses_no_file(
    tmp_path: Path,
    syncs: dict[str, Future[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    store = RunStore(tmp_path / "s", {})
    for key in (RESULT, STATE):
        store.put(key, {"x": torch.ones(8)})
    there = store._files._pending[store.directory / "result.0.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(there.on_disk, "result", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.require(1)
    syncs["result.0.partial"].set_result(None)
    store.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert _named(store) == ["result.0.safetensors", "state.0.safetensors"]


def test_recorded_results_come_back(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "s", {"a": 1})
    assert store.recall(KEY) is None
    assert not store.directory.exists()
    store.record({KEY: {"x": [1.5, float("inf")]}, Key("stage", "0"): 3.0})
    store.record({Key("other", "a"): 1.0, Key("other", "b"): 2.0})
    store.close()
    again = RunStore(tmp_path / "s", {"a": 1})
    assert again.recall(KEY) == {"x": [1.5, float("inf")]}
    assert again.recall(Key("stage", "0")) == 3.0
    assert KEY in again
    # The stage with 0.5 is another one.
    again.record({Key("third", "a"): 0.5})
    assert again.smallest("other") == 1.0


@pytest.mark.parametrize("torn", ['{"stage": "st', "null\n", '{"stage": 1}\n'])
def test_a_line_that_a_killed_run_tore_is_dropped(tmp_path: Path, torn: str) -> None:
    store = RunStore(tmp_path / "s", {})
    store.record({KEY: 1.0})
    path = store.directory / RESULTS
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    store.close()
    again = RunStore(tmp_path / "s", {})
    assert again.recall(KEY) == 1.0
    assert path.read_bytes() == whole
    again.record({Key("stage", 1): 2.0})
    again.close()
    assert RunStore(tmp_path / "s", {}).recall(Key("stage", 1)) == 2.0


def test_results_of_another_identity_are_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = RunStore(tmp_path / "s", {"--seed": 0, "same": 1, "config.json": "a"})
    store.record({KEY: 1.0})
    store.put(KEY, {"x": torch.ones(1)})
    store.close()
    other = RunStore(tmp_path / "s", {"--seed": 1, "same": 1, "config.json": "b"})
    with caplog.at_level(logging.WARNING):
        assert other.recall(KEY) is None
    assert "differs in --seed, config.json: starting again" in caplog.text
    assert KEY not in other
    assert list(store.directory.iterdir()) == []


def test_errors_name_the_file_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(tmp_path / "s", {})
    store.put(KEY, {"x": torch.ones(8)})
    with pytest.raises(
        PrepareError, match=r"stage\.2.* cannot be read .*remove .*/s a"
    ):
        store.get(Key("stage", 2))
    path = tmp_path / "s" / "stage.0.safetensors"
    store.require(1)  # waits until it is there
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PrepareError, match=r"stage\.0\.safetensors: cannot be read"):
        store.get(KEY)
    with pytest.raises(PrepareError, match=r"/s: .* take 1\d{18} bytes.*are free"):
        store.require(10**18)
    store.require(1)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    store.put(Key("other", 0), {})
    with pytest.raises(PrepareError, match=r"other.*No space left .*free space"):
        store.put(Key("other", 0), {})
    assert Key("other", 0) not in store
    with pytest.raises(
        PrepareError, match=r"results\.jsonl.*No space left .*free space"
    ):
        store.record({KEY: 1.0})
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").touch()
    with pytest.raises(PrepareError, match="did not create this directory"):
        RunStore(foreign, {}).put(KEY, {})
    assert [file.name for file in foreign.iterdir()] == ["thesis.txt"]


def test_what_the_user_put_there_stays(tmp_path: Path) -> None:
    with RunStore(tmp_path / "s", {}) as store:
        store.record({KEY: 1.0})
        (store.directory / "notes.txt").touch()
    assert [file.name for file in store.directory.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("identity", [{}, {"--seed": 1}], ids=["same", "other"])
def test_two_runs_at_once_do_not_share_a_directory(
    tmp_path: Path, identity: dict[str, Any]
) -> None:
    with RunStore(tmp_path / "s", {}) as first:
        first.record({KEY: 1.0})
        second = RunStore(tmp_path / "s", identity)
        for use in (lambda: second.recall(KEY), lambda: second.record({KEY: 2.0})):
            with pytest.raises(PrepareError, match="/s: another `prepare` is working"):
                use()
        assert first.recall(KEY) == 1.0
    with second:
        assert second.recall(KEY) is None
        second.record({KEY: 2.0})
    assert list(tmp_path.iterdir()) == []
