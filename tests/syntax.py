"""The syntax trees of Python sources, for the tests that read the program."""

import ast
import gc


def parsed(text: str) -> ast.Module:
    """The syntax tree of a text.

    No garbage is collected while it is made. Before Python 3.11.8, `ast.parse` fails with a SystemError ("recursion
    depth mismatch") if something that is collected runs code (CPython issue 106905).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        if was_enabled:
            gc.enable()
