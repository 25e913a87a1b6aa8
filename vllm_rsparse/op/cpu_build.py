# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels for CPUs for this machine, once, and load them.

The compiler is the one that ``torch.compile`` uses on CPUs (``$CXX``, else ``g++``), so
it is available where vLLM serves on a CPU. ``torch.utils.cpp_extension`` is not used:
the sources do not include torch, and it would need ninja on PATH, would not rebuild
when the processor changes under a shared home directory, and would wait forever for a
builder that was killed. Here a build is written next to its place and renamed, so
processes that build at the same time only duplicate work.
"""

import ctypes
import errno
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from vllm_rsparse.envs import cache_directory
from vllm_rsparse.errors import BuildError

logger = logging.getLogger(__name__)

_KERNELS = Path(__file__).parents[1] / "kernels"
_SOURCES = [_KERNELS / "rsparse_linear.cpp", _KERNELS / "dense_linear.cpp"]
_HEADERS = [
    _KERNELS / name
    for name in (
        "elements.h",
        "selection.h",
        "rows_float.h",
        "rows_fp8.h",
        "rows_int4.h",
    )
]
_NATIVE = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}
_FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared"]
# GCC prefers 256-bit vectors on several processors with AVX-512. Here 512-bit ones cost
# nothing, since the code waits for memory, and fewer instructions allow more loads in
# flight.
_X86_FLAGS = ["-mprefer-vector-width=512"]


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """The compiled kernel, from the cache if it was built before.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = os.environ.get("CXX") or "g++"
    flags = [*_FLAGS, *_native_flags()]
    # The compiler's own report on its version and this processor's instruction sets.
    macros = _run([compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256()
    texts = [path.read_bytes() for path in (*_SOURCES, *_HEADERS)]
    for part in (macros, " ".join([compiler, *flags]).encode(), *texts):
        key.update(part)
    name = f"rsparse_linear-{key.hexdigest()[:16]}.so"
    cached = cache_directory() / name
    try:
        if not cached.exists():
            _compile([compiler, *flags], cached)
        return ctypes.CDLL(str(cached))
    except OSError as error:
        # A read-only or noexec home directory: each process builds for itself.
        logger.info("rsparse: no cache in %s: %s", cached.parent, error)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        _compile([compiler, *flags], path)
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(
                f"{error}: the compiled kernel cannot be loaded from {cached.parent}"
                f" nor from {directory}; set XDG_CACHE_HOME or TMPDIR to a directory"
                " that is writable and not mounted noexec"
            ) from error


def _native_flags() -> list[str]:
    machine = platform.machine()
    if machine not in _NATIVE:
        return []
    return [_NATIVE[machine], *(_X86_FLAGS if machine == "x86_64" else [])]


def _compile(command: list[str], target: Path) -> None:
    """Compile to ``target``, which appears complete or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(descriptor)
    try:
        _run([*command, "-o", name, *map(str, _SOURCES)])
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def _run(command: list[str]) -> bytes:
    """Standard output of a compiler's run."""
    try:
        done = subprocess.run(command, capture_output=True)
    except OSError as error:
        raise BuildError(
            f"the C++ compiler {command[0]!r} does not run ({error.strerror}); install"
            " g++ (Debian: apt-get install g++, Fedora: dnf install gcc-c++), name"
            " another in CXX, or use VLLM_RSPARSE_BACKEND=cpu-torch, which needs none"
        ) from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace")
        advice = "Name another compiler in CXX (GCC 9 or later)"
        if os.strerror(errno.ENOSPC) in said:
            advice = "Free space, or set TMPDIR and XDG_CACHE_HOME to another disk"
        raise BuildError(
            f"{' '.join(command)}\nfailed:\n{said}\n{advice}, or use"
            " VLLM_RSPARSE_BACKEND=cpu-torch, which needs none"
        )
    return done.stdout
