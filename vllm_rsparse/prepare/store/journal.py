# SPDX-License-Identifier: Apache-2.0
"""What a search has found so far, on disk, so that an interrupted run resumes.

One JSON object a line: first what the search depends on, then one result each, flushed
when it is known. A search that is repeated asks here before it computes; with the same
seed it asks for the same things in the same order.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)


class Journal:
    """Results by key; the file goes when the run has ended well.

    Args:
        path: where it lies; made when the first result is noted.
        identity: JSON of everything that the results depend on. A file of another
            identity is replaced.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._header = json.dumps({"search": identity}, sort_keys=True)
        # None until a search asks: a recipe without one leaves the file alone.
        self._known: dict[str, Any] | None = None

    def get(self, key: str) -> Any:
        """An earlier result, or None."""
        return self._results.get(key)

    def smallest(self) -> Any:
        """The least result, where they are numbers."""
        return min(self._results.values())

    def note(self, results: Mapping[str, Any]) -> None:
        """Keep results; they are on disk when this returns."""
        self._results.update(results)
        new = not self.path.exists()
        with self.path.open("a", encoding="utf-8") as stream:
            if new:
                stream.write(self._header + "\n")
            for key, value in results.items():
                stream.write(json.dumps({"key": key, "value": value}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._known is None:
            return
        if error is None:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            logger.info(
                "the search so far is in %s: the same command goes on from there",
                self.path,
            )

    @property
    def _results(self) -> dict[str, Any]:
        if self._known is None:
            self._known = self._read()
        return self._known

    def _read(self) -> dict[str, Any]:
        results: dict[str, Any] = {}
        if not self.path.exists():
            return results
        header, *lines = self.path.read_text(encoding="utf-8").split("\n")
        if header != self._header:
            logger.warning(
                "%s is from a search with another model, text or options, or from"
                " another release: starting again",
                self.path,
            )
            self.path.unlink()
            return results
        whole = [header]
        for line in lines:
            try:
                entry = json.loads(line)
                results[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                break  # the last line of a run that was killed while writing
            whole.append(line)
        self.path.write_text("\n".join(whole) + "\n", encoding="utf-8")
        logger.info("resuming with %d results from %s", len(results), self.path)
        return results


def digest(*parts: Any) -> str:
    """Short hex digest of the text of some values."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
