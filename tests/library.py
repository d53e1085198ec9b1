"""Whether a library still has what a module of ours uses of it without a documented contract."""

import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

# By class and name: what the module relies on.
Internals = Mapping[tuple[type, str], str]


def gone(internals: Internals, objects: Mapping[type, Any], module: str) -> Iterator[str]:
    """What these objects, one of each class, do not have."""
    for (base, name), contract in internals.items():
        if not hasattr(objects[base], name):
            yield f"{base.__name__}.{name} is gone. {module} relies on it: {contract}."


def unlisted(
    internals: Internals, subclasses: Mapping[type, type], module: ModuleType, *, ours: Collection[str]
) -> Iterator[str]:
    """What the module overrides or reads and does not list. `ours` are private names of its own."""
    listed = {name for _, name in internals}
    for base, subclass in subclasses.items():
        for name in vars(subclass).keys() - {"__init__"} - listed:
            if inspect.isfunction(getattr(base, name, None)):
                yield f"{subclass.__name__}.{name} overrides a method of {base.__name__}: add it to INTERNALS."
    assert module.__file__ is not None
    file = Path(module.__file__)
    for name in set(re.findall(r"\.(_[a-z]\w*)", file.read_text(encoding="utf-8"))) - listed - set(ours):
        yield f"{file.name} reads the private {name}: add it to INTERNALS, or to the names that are ours."
