# SPDX-License-Identifier: Apache-2.0
"""Which distributions are installed, and which releases of vLLM this one is for."""

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


def installed(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def supported_vllm() -> SpecifierSet | None:
    """The releases that our own metadata (pyproject.toml, extra ``vllm``) allows."""
    try:
        lines = requires("vllm-rsparse") or []
    except PackageNotFoundError:
        return None
    for line in lines:
        requirement = Requirement(line)
        if requirement.name == "vllm":
            return requirement.specifier
    return None


def supports_vllm(release: str) -> bool:
    """Whether a release of vLLM is one of those.

    A build for CPU, 0.32.0+cpu, is a local version: specifiers ignore that part.
    """
    allowed = supported_vllm()
    return allowed is None or allowed.contains(release, prereleases=True)
