"""What all tests share: the databases that they run on, and how hypothesis runs.

Hypothesis looks for new examples in each run of a developer, and prints the blob that repeats a failure. If CI is
set, its examples follow from the tests themselves, so that no change is stopped by code that it did not touch. It has
no deadline of its own: each test has the time limit of pyproject.toml.

A property is tried with 100 examples in `policy` and `ledger`, which the promises rest on, and with 30 elsewhere.
`make nightly` tries 1,000 (`--hypothesis-profile nightly`). Tests that state a number of their own keep it.
"""

import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog
from aiohttp import web_app
from hypothesis import settings

if TYPE_CHECKING:
    from proxy.ledger.store import Store

# It asserts for several tests, and should show what it found as they do.
pytest.register_assert_rewrite("tests.clients.sessions")
for profile, examples in (("usual", 30), ("thorough", 100), ("nightly", 1000)):
    settings.register_profile(
        profile, max_examples=examples, derandomize=bool(os.environ.get("CI")), print_blob=True, deadline=None
    )
settings.load_profile("usual")
THOROUGH = ("policy", "ledger")


# A shell starts programs in the background with SIGINT ignored, which the programs that tests start would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Choose the number of examples before a module is imported: `@given` takes the profile that is loaded then."""
    if isinstance(collector, pytest.Module) and not collector.config.getoption("--hypothesis-profile"):
        settings.load_profile("thorough" if collector.path.parent.name in THOROUGH else "usual")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what is marked `every_engine` once on SQLite and once on PostgreSQL."""
    if metafunc.definition.get_closest_marker("every_engine"):
        metafunc.parametrize("_engine", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture(autouse=True)
def _engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose the engine of the stages of this test.

    It is an autouse fixture, because pytest removes a name that is only appended to `metafunc.fixturenames`: it
    computes the fixtures of a parametrized test anew. The fixture would not run, and all tests would run on SQLite
    twice.
    """
    if hasattr(request, "param"):
        monkeypatch.setattr("tests.stage.ENGINE", request.param)


@pytest.fixture(autouse=True)
def _free_servers() -> Iterator[None]:
    """Free the servers of the test.

    The HTTP library remembers the last 1,024 applications that it served, each with all that its server has: 1.5 GB
    at the end of all tests, and a collection of garbage took seconds.
    """
    yield
    web_app._cached_build_middleware.cache_clear()


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """Reset logging, which the commands set up for their process.

    Plain lines: the library's own renderer for terminals prints every local variable of a traceback, megabytes of
    bodies included.
    """
    structlog.configure(processors=[structlog.processors.add_log_level, structlog.processors.KeyValueRenderer()])
    hooks = sys.unraisablehook, threading.excepthook
    yield
    sys.unraisablehook, threading.excepthook = hooks  # pytest's own, which make a test fail
    structlog.reset_defaults()


@pytest.fixture(params=["sqlite", "postgresql"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> "AsyncIterator[Store]":
    """An open store of a new database, which has the schema and no rows, on each engine."""
    # Imported here, because coverage is measured from after this module on.
    from proxy.ledger.postgres import PostgresStore
    from proxy.ledger.sqlite import SqliteStore
    from tests.postgres import shared
    from tests.sqlite import write_migrated

    store: Store
    if request.param == "sqlite":
        write_migrated(tmp_path / "quotas.db")
        store = SqliteStore(tmp_path / "quotas.db")
    else:
        store = PostgresStore(await shared().migrated())
    await store.open()
    yield store
    await store.close()
