"""The documentation has everything that the program can show: each setting, header and error code.

The metrics and the fields of the log have tests of their own, beside what makes them.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.config.json_schema import settings_page
from tests.syntax import parsed

ROOT = Path(__file__).resolve().parents[1]
# wire.md and threats.md describe the APIs and faults of others.
PAGES = {
    page.name: page.read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md")
    if page.name not in ("wire.md", "threats.md")
}
DOCS = "\n".join(PAGES.values()).lower()
HEADER = re.compile(
    r"(?i)x-[a-z0-9-]+|retry-after|ratelimit[a-z-]*|anthropic-[a-z-]+|(?:api|idempotency)-key|request-id|trace[a-z]+"
)
# A coding of HTTP and a word of OpenAPI, which look like headers.
NO_HEADERS = {"x-gzip", "x-measure"}


def constants() -> Iterator[tuple[str, ast.AST]]:
    """Each text of the program, and the expression or statement that it is in."""
    for path in (ROOT / "proxy").rglob("*.py"):
        if "simulator" in path.parts or "torture" in path.parts:
            continue
        for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.Constant) and isinstance(child.value, str):
                    yield child.value, node


def headers() -> set[str]:
    """The headers that the program reads or writes, apart from those of all of HTTP."""
    return {text.lower() for text, _ in constants() if HEADER.fullmatch(text)} - NO_HEADERS


def error_codes() -> set[str]:
    """The values of `code` and `type` in errors."""
    found = set()
    for text, node in constants():
        match node:
            case ast.Assign(targets=[ast.Name(id="code" | "type")]) | ast.keyword(arg="code"):
                found.add(text)
    return found


@pytest.mark.parametrize("header", sorted(headers()))
def test_each_header_is_documented(header: str) -> None:
    """Whether the program reads it or writes it."""
    assert header in DOCS


@pytest.mark.parametrize("code", sorted(error_codes()))
def test_each_error_code_is_documented(code: str) -> None:
    """In backquotes, so that a word of prose does not count."""
    assert f"`{code}`" in DOCS


def test_the_page_of_settings_is_current() -> None:
    """`llm-quota-proxy schema --markdown > docs/settings.md` writes it."""
    assert PAGES["settings.md"] == settings_page()
