# SPDX-License-Identifier: Apache-2.0
"""The output directory: staged next to its final place, then renamed into it.

Whatever happens before the rename, OUTPUT does not exist or is unchanged.
"""

import errno
import json
import logging
import os
import secrets
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vllm_rsparse.arguments import output_problem
from vllm_rsparse.artifact.tensors import ARTIFACT_DIR, JSON_NAME, TENSORS_NAME
from vllm_rsparse.errors import CheckpointError, PrepareError
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.checkpoint_files import COMPANIONS, INDEX_NAME
from vllm_rsparse.prepare.store.files import write_text, writing_output

logger = logging.getLogger(__name__)


class StagedOutput:
    """Context manager that yields a staging directory and removes it on failure.

    Args:
        output: the directory to make.
        base: the base checkpoint's directory, which must stay untouched.
        overwrite: whether an earlier prepared directory may be replaced.
        links: whether there will be links to the base's files.

    Raises:
        PrepareError: OUTPUT exists, may not be replaced, or overlaps the base; on
            entering the context: nothing, or no link, can be written there.
    """

    def __init__(
        self, output: Path, base: Path, overwrite: bool, links: bool = True
    ) -> None:
        self.output = output.absolute()
        self._base = base
        self._overwrite = overwrite
        self._links = links
        if base.resolve().is_relative_to(self.output.resolve()):
            raise PrepareError(
                f"OUTPUT {output}: is, or contains, the base model {base}, which stays"
                " untouched; give another directory"
            )
        check_output(self.output, overwrite)
        token = secrets.token_hex(4)
        self.path = self.output.parent / f".{self.output.name}.{token}.partial"
        self._old = self.output.parent / f".{self.output.name}.{token}.old"

    def __enter__(self) -> Self:
        try:
            with self._writing():
                self.output.parent.mkdir(parents=True, exist_ok=True)
                (self.path / ARTIFACT_DIR).mkdir(parents=True)
            if self._links:
                self._require_links()
        except BaseException:  # Ctrl-C here would not reach __exit__
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def _writing(self) -> AbstractContextManager[None]:
        return writing_output(f"OUTPUT {self.output}")

    def _require_links(self) -> None:
        """A disk without links (FAT, some network shares) shows now, not at the end."""
        probe = self.path / "link"
        try:
            probe.symlink_to(self._base)
            probe.unlink()
        except OSError as error:
            raise PrepareError(
                f"OUTPUT {self.output}: its disk takes no link to the base's files"
                f" ({error}); use --copy-weights, or choose an OUTPUT on another disk"
            ) from error

    def _remove(self) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)

    @property
    def artifact(self) -> Path:
        """Directory for the artifact's two files."""
        return self.path / ARTIFACT_DIR

    @property
    def tensors(self) -> Path:
        """The artifact's file of tensors."""
        return self.artifact / TENSORS_NAME

    def add_base_files(
        self, checkpoint: Checkpoint, copy: bool, weights: bool = True
    ) -> None:
        """Link to (or copy) the base's weights, tokenizer and generation settings.

        Links are absolute and point to the file itself, not to the Hub cache's links.

        Args:
            checkpoint: the base model.
            copy: whether to copy.
            weights: False leaves out the weights and their index.

        Raises:
            CheckpointError: a file of the base is gone or cannot be read.
            PrepareError: OUTPUT cannot be written.
        """
        for file in _base_files(checkpoint, weights):
            with self._writing():
                if copy:
                    _copy(file, self.path / file.name)
                else:
                    (self.path / file.name).symlink_to(file.resolve())

    def write_config(self, config: dict[str, Any]) -> None:
        """Write ``config.json``, last: without it nothing would serve the directory."""
        write_text(
            self.path / "config.json",
            json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        )

    def check(self) -> None:
        """Refuse an OUTPUT that may not be written (see ``check_output``)."""
        check_output(self.output, self._overwrite)

    def commit(self) -> None:
        """Move the staged directory to OUTPUT, then delete what it replaced.

        Raises:
            PrepareError: OUTPUT may not be written, or cannot be.
        """
        self.check()
        with self._writing():
            if not os.path.lexists(self.output):
                os.rename(self.path, self.output)
                return
            os.rename(self.output, self._old)
            try:
                os.rename(self.path, self.output)
            except BaseException:
                os.rename(self._old, self.output)
                raise
        try:
            shutil.rmtree(self._old)
        except OSError as error:  # OUTPUT is complete
            logger.warning(
                "%s: what OUTPUT was before cannot be deleted (%s); delete it by hand",
                self._old,
                error,
            )


def _base_files(checkpoint: Checkpoint, weights: bool = True) -> list[Path]:
    """The base's weights, index, tokenizer and generation settings.

    Raises:
        CheckpointError: a file of the weights is gone.
    """
    files = checkpoint.weight_files if weights else []
    for file in files:
        if not file.is_file():
            raise _lost(file, os.strerror(errno.ENOENT))
    others = [checkpoint.directory / INDEX_NAME] if weights else []
    for pattern in COMPANIONS:
        others += sorted(checkpoint.directory.glob(pattern))
    return [*files, *(file for file in dict.fromkeys(others) if file.is_file())]


def _copy(file: Path, target: Path) -> None:
    """Copy a file of the base.

    Raises:
        CheckpointError: it cannot be read.
        OSError: the target cannot be written.
    """
    try:
        shutil.copyfile(file, target)
    except OSError as error:
        # An error of the copy itself, such as a full disk, names both files.
        if error.filename == str(file) and error.filename2 is None:
            raise _lost(file, str(error.strerror)) from error
        raise


def _lost(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: a file of the base model cannot be read any more ({why}); put it back"
        " and prepare again"
    )


def check_space(
    output: Path, checkpoint: Checkpoint, copies: int = 1, weights: int | None = None
) -> None:
    """Refuse, before any work is done, copies that do not fit on the disk.

    Args:
        output: OUTPUT.
        checkpoint: the base model.
        copies: how many directories there will be.
        weights: bytes of the weights where they are not copied as they are.

    Raises:
        PrepareError: they do not.
    """
    files = _base_files(checkpoint, weights is None)
    size = copies * (sum(file.stat().st_size for file in files) + (weights or 0))
    free = shutil.disk_usage(_existing(output)).free
    if size > free:
        raise PrepareError(
            f"OUTPUT {output}: --copy-weights needs {size / 1e9:.2g} GB there, and"
            f" {free / 1e9:.2g} GB are free; free space, choose a larger disk, or leave"
            " --copy-weights out, which links to the base's files"
        )


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists.

    Raises:
        PrepareError: a link on the way leads nowhere, where no folder can be made.
    """
    path = path.absolute()
    while not path.exists():
        if path.is_symlink():
            raise PrepareError(
                f"OUTPUT: {path} is a link to {os.path.realpath(path)}, which is gone;"
                " give another path"
            )
        path = path.parent
    return path


def check_recipe_file(path: Path, output: Path) -> None:
    """Refuse a recipe file that could not be written at the end of the run.

    Args:
        path: the file; it may exist.
        output: OUTPUT, which will exist by then.

    Raises:
        PrepareError: its folder does not exist or is not writable, or it is a folder.
    """
    problem = output_problem(path)
    made = path.absolute().parent == output.absolute() and not path.is_dir()
    if problem is not None and not made:
        raise PrepareError(f"--save-recipe {path}: {problem}")


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse a path that exists, unless it is a prepared directory to overwrite.

    Raises:
        PrepareError: it exists and may not be replaced, or cannot be written.
    """
    folder = _existing(output.absolute().parent)
    if not folder.is_dir():
        raise PrepareError(f"OUTPUT {output}: {folder} is a file; give another path")
    if not os.access(folder, os.W_OK):
        raise PrepareError(
            f"OUTPUT {output}: the folder {folder} is not writable; give another path"
        )
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise PrepareError(
            f"OUTPUT {output}: exists already; choose another name, or replace an"
            " earlier prepared directory with --overwrite"
        )
    if output.is_symlink() or not (output / ARTIFACT_DIR / JSON_NAME).is_file():
        raise PrepareError(
            f"OUTPUT {output}: --overwrite replaces only a directory that `prepare`"
            f" wrote (with {ARTIFACT_DIR}/{JSON_NAME}), and this is none; remove it"
            " yourself or choose another name"
        )
