# SPDX-License-Identifier: Apache-2.0
"""Checks that need no model: versions, plug-in, device, backend, launch table."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

from vllm_rsparse import __version__, envs
from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.doctor.finding import Finding, Level
from vllm_rsparse.releases import installed, supported_vllm, supports_vllm

_GIB = 1 << 30


def versions() -> Iterator[Finding]:
    """Python, ours, vLLM's and torch's versions."""
    others = [
        f"{name} {v}" for name in ("transformers", "triton") if (v := installed(name))
    ]
    yield Finding(
        Level.OK,
        "versions",
        f"python {platform.python_version()}, vllm-rsparse {__version__}, torch"
        f" {installed('torch')}, {', '.join(others)}",
    )
    found = installed("vllm")
    if found is None:
        yield Finding(
            Level.FAIL,
            "vllm",
            "not installed in this environment; install it with"
            " `pip install 'vllm-rsparse[vllm]'`, or deploy/cpu/install.sh for CPU",
        )
        return
    if supports_vllm(found):
        yield Finding(Level.OK, "vllm", found)
        return
    yield Finding(
        Level.WARN, "vllm", f"{found}; this release was written for {supported_vllm()}"
    )


def plugin() -> Iterator[Finding]:
    """Whether vLLM itself finds the entry point and resolves the method."""
    if not entry_points(group="vllm.general_plugins", name="rsparse"):
        yield Finding(
            Level.FAIL,
            "plug-in",
            "no entry point `rsparse` in group vllm.general_plugins: vllm-rsparse is on"
            " the path without being installed; pip install it in this environment",
        )
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "rsparse" not in allowed.split(","):
        yield Finding(
            Level.FAIL,
            "plug-in",
            f"VLLM_PLUGINS={allowed!r} excludes it; add `rsparse` or unset it",
        )
        return
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    method = get_quantization_config("rsparse")
    if failure := getattr(method, "failure", None):
        yield Finding(Level.FAIL, "plug-in", failure)
        return
    yield Finding(
        Level.OK,
        "plug-in",
        f"vLLM resolves quantization method `rsparse` to {method.__module__}."
        f"{method.__qualname__}",
    )


def device() -> Iterator[Finding]:
    """The device that vLLM would run on."""
    from vllm.platforms import current_platform

    kind = current_platform.device_type
    if kind == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
        yield Finding(
            Level.OK,
            "device",
            f"cpu, {platform.machine()}, {len(os.sched_getaffinity(0))} cores for this"
            f" process, {memory:.1f} GiB",
        )
        return
    if not kind:
        yield Finding(
            Level.FAIL,
            "device",
            "vLLM finds no device; is the driver installed, and is this vLLM built"
            " for it?",
        )
        return
    capability = current_platform.get_device_capability()
    memory = current_platform.get_device_total_memory() / _GIB
    detail = f"{current_platform.get_device_name()}, {memory:.1f} GiB"
    if capability is not None:
        detail += f", compute capability {capability.as_version_str()}"
    if capability is not None and capability.to_int() < 80:
        yield Finding(
            Level.FAIL, "device", f"{detail}; 8.0 (Ampere) or later is needed"
        )
        return
    yield Finding(Level.OK, "device", detail)


def backend(directory: Path | None = None) -> Iterator[Finding]:
    """The backend and switch point, and the parameters that set them.

    Args:
        directory: of a prepared model whose settings apply; None for a model whose
            config has no settings.

    Raises:
        SettingError: a setting, or the interval of the metrics, cannot be used.
    """
    from vllm.platforms import current_platform

    from vllm_rsparse.serving.route import choose_route

    device = current_platform.device_type
    if directory is None or not (directory / "config.json").is_file():
        route = choose_route([], device)
    else:
        from vllm_rsparse.serving.settings import Settings, format_of

        prepared = PreparedDirectory.open(directory)
        settings = Settings.of_quantization_config(
            prepared.config["quantization_config"]
        )
        info = prepared.artifact.info
        weights = format_of(settings.weights or info.weights, info)
        read = 1 - info.achieved_sparsity
        route = choose_route([settings.route], device, read, weights)
    envs.metrics_interval()  # refuses what would stop the server
    yield Finding(
        Level.WARN if route.policy.always_dense else Level.OK,
        "backend",
        route.describe(),
    )


def tuned_shapes() -> Iterator[Finding]:
    """Whether there are launch configurations for this GPU, and where."""
    from vllm.platforms import current_platform

    from vllm_rsparse.op.tuning import device_tables

    if current_platform.device_type != "cuda":
        yield Finding(Level.OK, "tuned shapes", "only the triton backend uses them")
        return
    name = current_platform.get_device_name()
    tables = device_tables(name)
    problems = {entry.problem for table in tables for entry in table.entries}
    places = ", then ".join(str(table.path) for table in tables)
    yield Finding(
        Level.OK if problems else Level.WARN,
        "tuned shapes",
        f"{len(problems)} shapes and formats tuned for {name}: {places}"
        if problems
        else f"none for {name}, defaults are used; tune with"
        " `vllm-rsparse bench MODEL --tune`",
    )
