"""What all tests share: nothing but how hypothesis runs.

Hypothesis stays random, also where CI is set, since a new example each run finds more than the same one; a failure
prints the blob that repeats it. It has no deadline of its own: each test has the time limit of pyproject.toml.
"""

from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

settings.register_profile("house", derandomize=False, print_blob=True, deadline=None)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """The commands set up logging for their process; no test may leave that to the next.

    Plain lines: the library's own for terminals draw every local variable of a traceback, megabytes of bodies too.
    """
    structlog.configure(processors=[structlog.processors.add_log_level, structlog.processors.KeyValueRenderer()])
    yield
    structlog.reset_defaults()
