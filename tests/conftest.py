"""What all tests share: on which databases they are played, and how hypothesis runs.

Hypothesis looks for new examples in each run of a developer, and prints the blob that repeats a failure. Where CI is
set its examples follow from the tests themselves, so that no change is stopped by what it did not touch. It has no
deadline of its own: each test has the time limit of pyproject.toml.
"""

import os
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

# It asserts for several tests, and should show what it found as they do.
pytest.register_assert_rewrite("tests.clients.sessions")
settings.register_profile("house", derandomize=bool(os.environ.get("CI")), print_blob=True, deadline=None)
settings.load_profile("house")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What is marked `every_engine` is played once on SQLite and once on PostgreSQL."""
    if metafunc.definition.get_closest_marker("every_engine"):
        metafunc.fixturenames.append("_engine")
        metafunc.parametrize("_engine", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def _engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.stage.ENGINE", request.param)


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """The commands set up logging for their process; no test may leave that to the next.

    Plain lines: the library's own for terminals draw every local variable of a traceback, megabytes of bodies too.
    """
    structlog.configure(processors=[structlog.processors.add_log_level, structlog.processors.KeyValueRenderer()])
    yield
    structlog.reset_defaults()
