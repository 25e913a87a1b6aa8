# SPDX-License-Identifier: Apache-2.0
"""The directory of the counts goes with its owner, at the latest at the next start."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_rsparse.metrics.directory import CountsDirectory, sweep

OWNER = """
import sys
from pathlib import Path
from vllm_rsparse.metrics.directory import CountsDirectory
directory = CountsDirectory(Path(sys.argv[1]))
(directory.path / "rank-0.counts").write_text("counts")
print(directory.path, flush=True)
sys.stdin.read()
"""


@contextmanager
def owner(parent: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process with a directory; it ends by itself when its input does."""
    argv = [sys.executable, "-c", OWNER, str(parent)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_a_killed_owners_directory_goes_with_the_next_start(tmp_path: Path) -> None:
    with owner(tmp_path) as (process, left), owner(tmp_path) as (_, alive):
        assert left.is_dir()
        process.kill()
        process.wait()
        assert left.is_dir()
        mine = CountsDirectory(tmp_path)
        assert not left.exists()
        assert alive.is_dir()
        assert sorted(tmp_path.iterdir()) == sorted([alive, mine.path])
        assert sweep(tmp_path) == []  # one's own is in use too


def test_an_owner_that_ends_removes_its_own(tmp_path: Path) -> None:
    with owner(tmp_path) as (process, path):
        process.communicate()
        assert not path.exists()


def test_what_was_not_made_here_stays(tmp_path: Path) -> None:
    with owner(tmp_path) as (process, left):
        process.kill()
    shared = tmp_path / "shared"
    shared.mkdir()
    link = shared / "vllm-rsparse-link"
    link.symlink_to(left)
    other = shared / "vllm-rsparse-other"  # being made: not locked yet
    other.mkdir()
    (shared / "vllm-rsparse-file").write_text("")
    assert sweep(shared) == []
    assert len(list(shared.iterdir())) == 3
    assert left.is_dir()


def test_another_users_directory_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with owner(tmp_path) as (process, left):
        process.kill()
    uid = left.stat().st_uid
    monkeypatch.setattr("os.getuid", lambda: uid + 1)
    assert sweep(tmp_path) == []
    monkeypatch.setattr("os.getuid", lambda: uid)
    assert sweep(tmp_path) == [left]
