# SPDX-License-Identifier: Apache-2.0
"""One run that writes several sparsities: the same artifacts as a run for each."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from vllm_rsparse.cli import main
from vllm_rsparse.errors import PrepareError
from vllm_rsparse.prepare.pipeline import prepare, prepare_all
from vllm_rsparse.prepare.store.run_store import Key, RunStore

from .runs import contents, short

SPARSITIES = (0.3, 0.55)
options = partial(short, sparsity=SPARSITIES, recipe="best")


def with_config(output: Path) -> dict[str, bytes]:
    return contents(output) | {"config.json": (output / "config.json").read_bytes()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def singles(tiny_llama: Path, tmp_path: Path) -> list[dict[str, bytes]]:
    """What a run for each sparsity writes with ``best``."""
    result = []
    for number, sparsity in enumerate(SPARSITIES):
        output = tmp_path / f"single{number}"
        prepare(options(tiny_llama, output, sparsity=sparsity))
        result.append(with_config(output))
    return result


@pytest.mark.parametrize("recipe", ["uniform", "greedy"])
def test_each_is_what_a_run_of_its_own_writes(
    tiny_llama: Path, tmp_path: Path, recipe: str
) -> None:
    infos = prepare_all(options(tiny_llama, tmp_path / "all", recipe=recipe))
    assert names(tmp_path) == ["all-0.3", "all-0.55"]
    assert [info.sparsity for info in infos] == list(SPARSITIES)
    for sparsity in SPARSITIES:
        output = tmp_path / f"single-{sparsity}"
        prepare(options(tiny_llama, output, recipe=recipe, sparsity=sparsity))
        assert with_config(tmp_path / f"all-{sparsity}") == with_config(output)


def test_a_killed_run_leaves_nothing_half_written_and_resumes(
    tiny_llama: Path,
    tmp_path: Path,
    singles: list[dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first artifact is complete by then, and the second half calibrated."""
    folder = tmp_path / "several"
    put = RunStore.put
    kept: list[str] = []

    def killed(
        self: RunStore, key: Key, tensors: Mapping[str, Tensor], note: Any = None
    ) -> None:
        put(self, key, tensors, note)
        kept.append(str(key))
        if str(key) == "calibrated.0.55.1" and kept.count(str(key)) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunStore, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_all(options(tiny_llama, folder / "out"))
    assert names(folder) == ["out.search"]
    first_run = len(kept)
    prepare_all(options(tiny_llama, folder / "out"))
    assert names(folder) == ["out-0.3", "out-0.55"]
    # The shared stages, and the trials, are not run again.
    assert {key.split(".")[0] for key in kept[first_run:]} == {"calibrated"}
    for sparsity, single in zip(SPARSITIES, singles, strict=True):
        assert with_config(folder / f"out-{sparsity}") == single


def test_an_output_that_exists_is_refused_before_any_work(
    tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "out-0.55").mkdir()
    with pytest.raises(PrepareError, match=r"OUTPUT .*out-0\.55: exists already"):
        prepare_all(options(tiny_llama, tmp_path / "out"))
    assert names(tmp_path) == ["out-0.55"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": (0.3, 0.30000001)}, r"--sparsity 0.3 0.3: two values are the"),
        ({"sparsity": (0.3, 1.0)}, r"--sparsity must lie in \[0, 1\), got 1.0"),
        ({"save_recipe": Path("r.json")}, r"--save-recipe r.json: goes with one --spa"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PrepareError, match=message):
        options(Path("model"), Path("out"), **changes)


def test_one_value_names_no_directory_after_it(tmp_path: Path) -> None:
    assert options(Path("m"), Path("out"), sparsity=(0.3,)).outputs == (Path("out"),)


def test_a_model_behind_the_values(capsys: pytest.CaptureFixture[str]) -> None:
    """Several values take every word that follows."""
    with pytest.raises(SystemExit):
        main(["prepare", "--sparsity", "0.5", "model", "out"])
    assert "got 'model'; put MODEL and OUTPUT before it" in capsys.readouterr().err
