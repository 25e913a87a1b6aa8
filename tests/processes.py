# SPDX-License-Identifier: Apache-2.0
"""Which tests stay together where processes share the tests (``make test``).

A file's tests share its fixtures. Those that start vLLM are one group: an engine needs
free ports, which another that starts meanwhile could take, and one prepared model and
one import of vLLM serve them all. That group takes the longest, so it goes first.

pytest-xdist has groups of its own (``--dist loadgroup``), but 3.8 writes them into an
attribute that pytest 9.2 does not read, and then distributes every test by itself.
"""

from typing import Any

import pytest

# Where tests may be marked ``serve``.
FOLDERS = ("tests/e2e/", "tests/distributed/")


def group(nodeid: str) -> str:
    """The name of a test's group."""
    return "serve" if nodeid.startswith(FOLDERS) else nodeid.partition("::")[0]


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Put the group that starts vLLM first, and see that it is complete."""
    for item in items:
        if item.get_closest_marker("serve") and group(item.nodeid) != "serve":
            raise pytest.UsageError(
                f"{item.nodeid} is marked serve, which is for tests in"
                f" {' and '.join(FOLDERS)}: others run at the same time"
            )
    if hasattr(config, "workerinput"):  # of pytest-xdist
        items.sort(key=lambda item: group(item.nodeid) != "serve")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute the tests by group."""
    from xdist.scheduler import LoadFileScheduling

    class GroupScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return GroupScheduling(config, log)
