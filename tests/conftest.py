"""What all tests share: nothing but how hypothesis runs.

Hypothesis stays random, also where CI is set, since a new example each run finds more than the same one; a failure
prints the blob that repeats it. It has no deadline of its own: each test has the time limit of pyproject.toml.
"""

from hypothesis import settings

settings.register_profile("house", derandomize=False, print_blob=True, deadline=None)
settings.load_profile("house")
