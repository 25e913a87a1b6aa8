# SPDX-License-Identifier: Apache-2.0
"""What is installed, from where, and that it leaves Hugging Face's `kernels` alone."""

import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import vllm_rsparse

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_kernels_is_no_importable_package() -> None:
    """With an `__init__.py` it would shadow Hugging Face's package of that name."""
    assert not (ROOT / "kernels/__init__.py").exists()


def test_nothing_else_is_called_kernels() -> None:
    """A script's own folder is first on sys.path, so the name is taken everywhere."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    named = {
        str(Path(*path.parts[: index + 1]))
        for path in map(Path, tracked.stdout.splitlines())
        for index, part in enumerate(path.parts)
        if part in ("kernels", "kernels.py")
    }
    assert named == {"kernels", "vllm_rsparse/kernels"}


def test_symlink_resolves_to_the_sources() -> None:
    link = ROOT / "vllm_rsparse/kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert link.resolve() == ROOT / "kernels"


def test_installed_kernels_wins_over_the_source_folder(tmp_path: Path) -> None:
    """From the repository root, a regular package anywhere beats the bare folder."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("ORIGIN = 'installed'\n")
    printed = _python_at_root(
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "import kernels; print(kernels.ORIGIN)"
    )
    assert printed == "installed"


def test_transformers_works_from_the_root() -> None:
    """Its modeling_utils imports Hugging Face's `kernels` where that is installed."""
    try:
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        # Without it transformers must not take the source folder for it.
        statement = (
            "from transformers.utils import is_kernels_available\n"
            "print(is_kernels_available())"
        )
        expected = "False"
    else:
        statement = "import kernels\nprint(hasattr(kernels, 'get_kernel'))"
        expected = "True"
    printed = _python_at_root(f"import transformers.modeling_utils\n{statement}")
    assert printed == expected


def _python_at_root(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel as built from a source distribution, by way of both formats."""
    out = tmp_path_factory.mktemp("dist")
    build = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT],
        cwd=out,
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def _read(wheel: zipfile.ZipFile, name: str) -> str:
    (member,) = (m for m in wheel.namelist() if m.endswith(f".dist-info/{name}"))
    return wheel.read(member).decode()


def test_wheel_holds_every_source_file(wheel: zipfile.ZipFile) -> None:
    sources = [p.relative_to(ROOT) for p in (ROOT / "vllm_rsparse").rglob("*.py")]
    sources += [Path("vllm_rsparse") / p for p in _kernel_sources()]
    assert {str(path) for path in sources} == {
        name for name in wheel.namelist() if name.endswith(".py")
    }


def _kernel_sources() -> list[Path]:
    files = [p.relative_to(ROOT) for p in (ROOT / "kernels").glob("*.py")]
    assert files, "kernels/ is empty"
    return files


def test_wheel_holds_the_data_files(wheel: zipfile.ZipFile) -> None:
    configs = (ROOT / "vllm_rsparse/op/configs").glob("*.json")
    expected = {f"vllm_rsparse/op/configs/{path.name}" for path in configs}
    expected |= {"vllm_rsparse/py.typed"}
    # Compiled where they run: without the sources a wheel has no CPU kernels.
    files = (ROOT / "kernels").iterdir()
    native = [path for path in files if path.suffix in {".cpp", ".h"}]
    assert len(native) > 2
    expected |= {f"vllm_rsparse/kernels/{path.name}" for path in native}
    assert expected <= set(wheel.namelist())


def test_wheel_has_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    """A top-level `kernels` would overwrite Hugging Face's, and delete it later."""
    assert _read(wheel, "top_level.txt").split() == ["vllm_rsparse"]
    roots = {name.split("/")[0] for name in wheel.namelist()}
    version = PYPROJECT["project"]["version"]
    assert roots == {"vllm_rsparse", f"vllm_rsparse-{version}.dist-info"}


def test_wheel_has_the_entry_points(wheel: zipfile.ZipFile) -> None:
    entry_points = _read(wheel, "entry_points.txt")
    assert "[vllm.general_plugins]\nrsparse = vllm_rsparse.plugin:register" in (
        entry_points
    )
    assert "[console_scripts]\nvllm-rsparse = vllm_rsparse.cli:main" in entry_points


def test_wheel_carries_the_licence(wheel: zipfile.ZipFile) -> None:
    assert "Apache License" in _read(wheel, "licenses/LICENSE")


@pytest.mark.parametrize(
    ("group", "name"),
    [("vllm.general_plugins", "rsparse"), ("console_scripts", "vllm-rsparse")],
)
def test_installed_entry_point_loads(group: str, name: str) -> None:
    (entry_point,) = metadata.entry_points(group=group, name=name)
    assert callable(entry_point.load())


def test_version_has_one_source() -> None:
    version = PYPROJECT["project"]["version"]
    assert metadata.version("vllm-rsparse") == version
    assert vllm_rsparse.__version__ == version
