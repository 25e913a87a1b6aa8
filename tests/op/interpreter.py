# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter without work that makes it take twice the time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest


@contextmanager
def patched_once() -> Iterator[None]:
    """Do what Triton patches for a launch once, and not at every device function.

    ``_patch_lang`` searches all of ``triton.language`` whenever one device function
    calls another: 28% of an interpreted kernel's time, to set what is set already.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang
    modules_of: dict[Callable[..., Any], set[str]] = {}
    patched: set[str] = set()

    class Scope:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def restore(self) -> None:
            patched.clear()
            self.inner.restore()

    def patch(fn: Callable[..., Any]) -> Scope | None:
        if fn not in modules_of:
            modules_of[fn] = {
                value.__name__
                for value in fn.__globals__.values()
                if value is interpreter.tl or value is interpreter.tl.core
            }
        if modules_of[fn] <= patched:
            return None
        patched.update(modules_of[fn])
        return Scope(original(fn))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch)
        yield


@contextmanager
def integer_overflow_checked(checked: bool) -> Iterator[None]:
    """Whether additions and products of int32 are also done in int64 and compared.

    A quarter of an interpreted kernel's time. An overflow that reaches a result also
    shows there: numpy wraps around like the device.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    options = replace(builder.options, sanitize_overflow=checked)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(builder, "options", options)
        yield
