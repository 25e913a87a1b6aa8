# SPDX-License-Identifier: Apache-2.0
"""The experiment in benchmarks/small_model: its splits, its text, its table."""

import importlib
import json
import lzma
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer


@pytest.fixture
def load(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import a script of the experiment as it is run: from its own folder."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    monkeypatch.syspath_prepend(str(repository / "benchmarks/small_model"))
    # Set on import, and of no concern to the other tests.
    monkeypatch.setenv("TQDM_DISABLE", "1")

    loaded = set(sys.modules)

    def run(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield run
    for name in {"checkout", "compare", "limits", "sources", "text"} - loaded:
        sys.modules.pop(name, None)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Forty small packages and a large one of each domain, each file its own text."""
    for index in range(40):
        code = tmp_path / f"python/package{index}"
        code.mkdir(parents=True)
        (code / "module.py").write_text(f"value = {index}\nprint(value)\n" * 30)
        docs = tmp_path / f"doc/lib{index}"
        docs.mkdir(parents=True)
        (docs / "index.html").write_text(
            f"<head><title>t</title></head><p>Library {index} &amp; its use.</p>" * 30
        )
        (docs / "changelog.txt").write_text(f"Fixed bug {index}\n" * 60)
    for index in range(60):
        for name in ("python/large", "doc/large"):
            (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / f"python/large/m{index}.py").write_text(f"large = {index}\n" * 50)
        (tmp_path / f"doc/large/m{index}.txt").write_text(f"Large item {index}.\n" * 50)
    return tmp_path


def gathered(load: Any, machine: Path) -> list[Any]:
    return list(load("sources").documents([machine / "python"], [machine / "doc"]))


def test_no_package_is_in_two_splits(load: Any, machine: Path) -> None:
    parts = load("text").split(gathered(load, machine), 5_000)
    for domain in ("code", "english"):
        groups = {
            name: {document.group for document in parts[name, domain]}
            for name in ("train", "calibration", "heldout")
        }
        assert all(groups.values())
        assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == 41
        assert "large" in groups["train"]
        for name in ("calibration", "heldout"):
            assert len(groups[name]) >= 5
            assert sum(len(d.text) for d in parts[name, domain]) >= 5_000


def test_split_does_not_depend_on_the_order_of_files(load: Any, machine: Path) -> None:
    found = gathered(load, machine)
    split = load("text").split
    one, other = split(found, 5_000), split(found[::-1], 5_000)
    assert {name: set(members) for name, members in one.items()} == {
        name: set(members) for name, members in other.items()
    }


def test_too_little_text_is_told(load: Any, machine: Path) -> None:
    with pytest.raises(ValueError, match=r"not enough code text.*--python or --docs"):
        load("text").split(gathered(load, machine), 1_000_000)


def test_documents_are_read_once_and_without_markup(load: Any, machine: Path) -> None:
    before = gathered(load, machine)
    (machine / "python/copy").mkdir()
    original = machine / "python/package0/module.py"
    (machine / "python/copy/module.py").write_text(original.read_text())
    assert [d.text for d in gathered(load, machine)].count(original.read_text()) == 1
    assert len(gathered(load, machine)) == len(before)
    texts = [d.text for d in before if d.group == "lib7"]
    assert texts == ["\n".join(["Library 7 & its use."] * 30) + "\n"]


def test_mixed_draws_evenly(load: Any) -> None:
    drawn = list(load("text").mixed([["aa", "aa", "aa"], ["b", "b"]]))
    assert drawn == ["aa", "b", "b", "aa", "aa"]


def test_folder_fits_and_holds_the_training_texts(
    load: Any, machine: Path, repository: Path
) -> None:
    output = machine / "text"
    load("text").gather([machine / "python"], [machine / "doc"], output, 1, 5_000)
    assert sum(file.stat().st_size for file in output.iterdir()) < 1e6
    (shard,) = output.glob("train*.u16.xz")
    ids = np.frombuffer(lzma.decompress(shard.read_bytes()), dtype="<u2")
    summary = json.loads((output / "text.json").read_text())
    assert summary["train_tokens"] == len(ids)
    asset = repository / "tests/assets/pyllama-8m/tokenizer.json"
    text = Tokenizer.from_file(str(asset)).decode(ids.tolist())
    sizes = summary["characters"]
    assert len(text) == sizes["train-code"] + sizes["train-english"]
    for name, packages in summary["packages"].items():
        for package in packages:
            number = package.removeprefix("package").removeprefix("lib")
            held = f"value = {number}\n" if "code" in name else f"Library {number} &"
            assert held in (output / f"{name}.txt").read_text()
            assert held not in text


def test_table_has_a_cell_for_every_job_and_marks_what_is_missing(load: Any) -> None:
    compare = load("compare")
    jobs = compare.all_jobs(compare.NAMES, compare.DOMAINS)
    figures = {"perplexity_dense": 4.0, "ratio": 1.25, "achieved_sparsity": 0.501}
    rows = [
        {
            "recipe": job.recipe,
            "sparsity": job.sparsity,
            "calibrated_on": job.calibrated_on,
            "code": figures,
            "english": {**figures, "ratio": 1.5},
        }
        for job in jobs
    ]
    code, english = compare.table(rows, jobs, compare.DOMAINS).split("\n\n")
    assert code.startswith("code, dense 4.000")
    assert code.count("1.250 (0.501)") == len(rows) == english.count("1.500 (0.501)")
    best = compare.table(rows[:1], jobs, compare.DOMAINS).splitlines()[1].split()
    assert best == ["best", "code", "-", "-", "1.250", "(0.501)", "-", "-"]
    assert "1.2" not in compare.table([], jobs, compare.DOMAINS)


def test_every_recipe_is_known(load: Any) -> None:
    from vllm_rsparse.prepare.recipe.recipes import RECIPES

    compare = load("compare")
    assert set(compare.NAMES) <= {*RECIPES, *compare.SPARSE}
    assert set(compare.SPARSE.values()) <= RECIPES.keys()


def test_time_limit_ends_what_takes_longer(load: Any) -> None:
    limit = load("limits").time_limit
    with limit(60):
        pass
    with pytest.raises(TimeoutError, match="0 s have passed"), limit(0.05):
        time.sleep(60)
