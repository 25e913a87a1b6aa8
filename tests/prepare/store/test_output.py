# SPDX-License-Identifier: Apache-2.0
"""The staged output directory: all or nothing, and never the base."""

import json
import os
import shutil
from pathlib import Path

import pytest

from vllm_rsparse.errors import CheckpointError, PrepareError
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.prepare.store import output as output_module
from vllm_rsparse.prepare.store.output import (
    StagedOutput,
    check_output,
    check_recipe_file,
    check_space,
)

BASE_FILES = (
    "model.safetensors",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def _earlier_output(path: Path) -> Path:
    (path / "rsparse").mkdir(parents=True)
    (path / "rsparse" / "rsparse.json").write_text("old")
    return path


def _listing(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_links_lead_to_the_files_themselves(tmp_path: Path, pyllama: Path) -> None:
    # As in the Hub's cache, where a snapshot consists of links to blobs.
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in (*BASE_FILES, "config.json"):
        (snapshot / file).symlink_to(pyllama / file)
    (snapshot / "consolidated.safetensors").touch()
    (snapshot / "params.json").touch()
    output = tmp_path / "out"
    with StagedOutput(output, snapshot, overwrite=False) as staged:
        staged.add_base_files(Checkpoint(snapshot), copy=False)
        staged.write_config({"a": "ü"})
        staged.commit()
    assert _listing(output) == sorted((*BASE_FILES, "config.json", "rsparse"))
    for file in BASE_FILES:
        assert (output / file).readlink() == (pyllama / file).resolve()
    assert json.loads((output / "config.json").read_text("utf-8")) == {"a": "ü"}


def test_copies_do_not_depend_on_the_base(tmp_path: Path, pyllama: Path) -> None:
    output = tmp_path / "out"
    with StagedOutput(output, pyllama, overwrite=False) as staged:
        staged.add_base_files(Checkpoint(pyllama), copy=True)
        staged.commit()
    for file in BASE_FILES:
        assert not (output / file).is_symlink()
        assert (output / file).read_bytes() == (pyllama / file).read_bytes()


@pytest.mark.parametrize(
    ("gone", "copy"), [("before", False), ("before", True), ("meanwhile", True)]
)
def test_a_file_of_the_base_that_is_lost_is_named(
    gone: str,
    copy: bool,
    tmp_path: Path,
    pyllama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tmp_path / "base"
    shutil.copytree(pyllama, base)
    checkpoint = Checkpoint(base)
    weights = base / "model.safetensors"
    if gone == "before":
        weights.unlink()
    else:
        original = shutil.copyfile

        def copyfile(source: Path, target: Path) -> None:
            weights.unlink()
            original(source, target)

        monkeypatch.setattr(shutil, "copyfile", copyfile)
    with (
        pytest.raises(CheckpointError, match=rf"{weights}: .*put it back") as error,
        StagedOutput(tmp_path / "out", base, overwrite=False) as staged,
    ):
        staged.add_base_files(checkpoint, copy)
    assert "OUTPUT" not in str(error.value)


def test_a_full_disk_is_an_error_of_output(
    tmp_path: Path, pyllama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        # As shutil raises it: with both names.
        raise OSError(28, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    with (
        pytest.raises(
            PrepareError, match=r"OUTPUT .*/out: cannot be written.*No space"
        ),
        StagedOutput(tmp_path / "out", pyllama, overwrite=False) as staged,
    ):
        staged.add_base_files(Checkpoint(pyllama), copy=True)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing(
    error: type[BaseException], tmp_path: Path, pyllama: Path
) -> None:
    def fail() -> None:
        with StagedOutput(tmp_path / "out", pyllama, overwrite=False) as staged:
            staged.write_config({})
            raise error

    with pytest.raises(error):
        fail()
    assert _listing(tmp_path) == []


def test_an_existing_output_is_refused(tmp_path: Path, pyllama: Path) -> None:
    output = _earlier_output(tmp_path / "out")
    with pytest.raises(PrepareError, match=r"OUTPUT .*out: exists already.*--overwrit"):
        StagedOutput(output, pyllama, overwrite=False)


def test_overwriting_replaces_all(tmp_path: Path, pyllama: Path) -> None:
    output = _earlier_output(tmp_path / "out")
    (output / "leftover").touch()
    with StagedOutput(output, pyllama, overwrite=True) as staged:
        (staged.artifact / "rsparse.json").write_text("new")
        staged.commit()
    assert _listing(tmp_path) == ["out"]
    assert _listing(output) == ["rsparse"]
    assert (output / "rsparse" / "rsparse.json").read_text() == "new"


def test_a_failed_overwrite_loses_nothing(tmp_path: Path, pyllama: Path) -> None:
    output = _earlier_output(tmp_path / "out")
    staged = StagedOutput(output, pyllama, overwrite=True)
    with pytest.raises(KeyboardInterrupt), staged:
        raise KeyboardInterrupt
    assert _listing(tmp_path) == ["out"]
    assert (output / "rsparse" / "rsparse.json").read_text() == "old"


def test_a_failed_rename_restores_the_old_output(
    tmp_path: Path, pyllama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = _earlier_output(tmp_path / "out")
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    staged = StagedOutput(output, pyllama, overwrite=True)
    with pytest.raises(PrepareError, match=r"OUTPUT .*/out: .* \(no\); .*"), staged:
        staged.commit()
    assert _listing(tmp_path) == ["out"]
    assert (output / "rsparse" / "rsparse.json").read_text() == "old"


def test_an_old_output_that_cannot_be_deleted_is_named(
    tmp_path: Path,
    pyllama: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = _earlier_output(tmp_path / "out")

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with StagedOutput(output, pyllama, overwrite=True) as staged:
        monkeypatch.setattr(shutil, "rmtree", refused)
        staged.commit()
    assert not (output / "rsparse" / "rsparse.json").exists()  # the new one
    (old,) = (name for name in _listing(tmp_path) if name.endswith(".old"))
    assert f"{old}: what OUTPUT was before cannot be deleted" in caplog.text


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a Linux file system")
def test_a_file_system_that_holds_no_files(pyllama: Path) -> None:
    """For root, the folder looks writable."""
    output = Path("/proc/rsparse/out")
    message = (
        r"OUTPUT /proc/rsparse/out: (cannot be written \(|the folder /proc is not)"
    )
    with (
        pytest.raises(PrepareError, match=message),
        StagedOutput(output, pyllama, overwrite=False),
    ):
        pass


def test_a_file_system_without_links(
    tmp_path: Path, pyllama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refused)
    message = r"OUTPUT .*/out: its disk takes no link .*not permitted.* --copy-weights"
    with (
        pytest.raises(PrepareError, match=message),
        StagedOutput(tmp_path / "out", pyllama, overwrite=False),
    ):
        pass
    assert _listing(tmp_path) == []
    with StagedOutput(
        tmp_path / "out", pyllama, overwrite=False, links=False
    ) as staged:
        staged.add_base_files(Checkpoint(pyllama), copy=True)
        staged.commit()
    assert _listing(tmp_path) == ["out"]


def test_only_what_prepare_wrote_is_overwritten(tmp_path: Path, pyllama: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    with pytest.raises(PrepareError, match="replaces only a directory that `prepare`"):
        StagedOutput(precious, pyllama, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(_earlier_output(tmp_path / "out"))
    with pytest.raises(PrepareError, match="replaces only a directory that `prepare`"):
        StagedOutput(link, pyllama, overwrite=True)


def test_an_output_that_appears_meanwhile_is_kept(
    tmp_path: Path, pyllama: Path
) -> None:
    output = tmp_path / "out"
    staged = StagedOutput(output, pyllama, overwrite=False)
    output.mkdir()
    with pytest.raises(PrepareError, match="exists already"), staged:
        staged.commit()
    assert _listing(tmp_path) == ["out"]
    assert _listing(output) == []


def test_the_base_is_never_the_output(tmp_path: Path) -> None:
    base = _earlier_output(tmp_path / "outer" / "base")
    for output in (base, base.parent, base / ".." / "base"):
        with pytest.raises(PrepareError, match="is, or contains, the base model"):
            StagedOutput(output, base, overwrite=True)


def test_a_recipe_file_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "old.json").touch()
    for path in (tmp_path / "new.json", tmp_path / "old.json"):
        check_recipe_file(path, tmp_path / "out")
    # OUTPUT is there by the time that the recipe is written.
    check_recipe_file(tmp_path / "out" / "recipe.json", tmp_path / "out")


def test_a_recipe_file_that_could_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(
        PrepareError, match=r"--save-recipe .*no folder .*/nosuch; make"
    ):
        check_recipe_file(tmp_path / "nosuch" / "r.json", tmp_path / "out")
    with pytest.raises(PrepareError, match=r"--save-recipe .* is a folder; give"):
        check_recipe_file(tmp_path, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(PrepareError, match=r"no folder .*/file; make it"):
        check_recipe_file(tmp_path / "file" / "r.json", tmp_path / "out")


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PrepareError, match=r"OUTPUT .*: .*/file is a file"):
        check_output(tmp_path / "file" / "a" / "out", overwrite=False)
    check_output(tmp_path / "a" / "b" / "out", overwrite=False)
    # root may write everywhere but to a read-only disk.
    monkeypatch.setattr(output_module.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(PrepareError, match=f"OUTPUT .*: the folder {tmp_path} is not"):
        check_output(tmp_path / "a" / "b" / "out", overwrite=False)


@pytest.mark.parametrize(("copies", "weights"), [(1, None), (3, None), (2, 12345)])
def test_copies_that_do_not_fit_are_refused(
    tmp_path: Path,
    pyllama: Path,
    monkeypatch: pytest.MonkeyPatch,
    copies: int,
    weights: int | None,
) -> None:
    """Weights that are not copied as they are count by their own size."""
    names = BASE_FILES if weights is None else BASE_FILES[1:]
    size = sum((pyllama / name).stat().st_size for name in names) + (weights or 0)

    def check(free: int) -> None:
        usage = output_module.shutil._ntuple_diskusage(1, 1, free)
        monkeypatch.setattr(output_module.shutil, "disk_usage", lambda path: usage)
        check_space(tmp_path / "a" / "out", Checkpoint(pyllama), copies, weights)

    check(copies * size)
    with pytest.raises(PrepareError, match=r"--copy-weights needs 0.0.*are free"):
        check(copies * size - 1)


def test_an_output_below_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(PrepareError, match=r"link is a link to .*gone, which is gone"):
        check_output(tmp_path / "link" / "a" / "out", overwrite=False)
