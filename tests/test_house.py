"""The house rules that no other tool checks.

The order of the packages is checked by import-linter, style and types by ruff and mypy. Each rule here looks at
the source of `proxy/` and names what breaks it, with what to do instead. If breaking a rule is better, EXEMPT says so
with the reason; an exemption that is no longer needed fails, so the list only shrinks.
"""

import ast
import importlib
import json
import re
import tomllib
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.syntax import parsed

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "proxy"

LINES_MAX, LINES_WARNED = 800, 500
FUNCTION_LINES_MAX = 80
PARAMETERS_MAX = 6

# Pure: no await, no clock, no SQL, no sockets, no files, no log. So they are tested by tables and by a thousand
# random histories. A name is that of a package or of a module in it.
PURE = (
    "errors policy formats ledger.entry ledger.book ledger.rows upstreams.failures "
    "upstreams.headers upstreams.routing upstreams.usage_option identity.keys"
).split()
NOT_IN_PURE = frozenset(
    "aiohttp aiosqlite alembic asyncio asyncpg logging os pathlib prometheus_client select socket sqlalchemy sqlite3 "
    "ssl structlog subprocess tempfile threading time uvloop yaml".split()
)

SERVER = ("web", "simulator.server", "server")
CLOCK = (
    ("server", "torture.cli"),
    "take `now` as a parameter, or a `now` function in the constructor; server.py passes the real one",
)
ENVIRONMENT = (
    ("commands.context", "commands.serve", "torture.cli"),
    "write ${NAME} in the YAML; the commands pass the environment to config.interpolation",
)

# Which name may be used where; the longest prefix that fits decides. Each external library has one place, which also
# translates its errors, so that the rest of the code never learns its names.
NAMED_ONLY_IN: dict[str, tuple[tuple[str, ...], str]] = {
    "sqlalchemy": (
        (
            *("ledger.schema", "ledger.store", "ledger.sqlite", "ledger.postgres", "ledger.migrations"),
            *("ledger.primary", "ledger.queries", "ledger.notices", "ledger.replicas", "ledger.copy"),
            *("identity.admins", "identity.database", "administration"),
        ),
        "SQL stays in the ledger's engines and modules of queries, in identity.database and in administration",
    ),
    "alembic": (("ledger.schema", "ledger.migrations"), "migrations stay in ledger.schema"),
    "aiosqlite": ((), "SQLAlchemy loads it, by the database's URL"),
    "asyncpg": (("ledger.postgres", "ledger.primary", "torture.database"), "SQL stays in the engines of the ledger"),
    "sqlite3": (
        ("ledger.backup", "ledger.sqlite", "torture.database"),
        "ask the ledger; torture judges it by its files, and the online backup is a function of the driver",
    ),
    "aiohttp": (
        ("upstreams.sending", "commands.events", "torture.clients", "torture.administrator"),
        "HTTP clients stay in these modules; for the server write `from aiohttp import web`",
    ),
    "aiohttp.helpers": (("web.response",), "only the Date of an answer is taken from there"),
    "aiohttp.web": (SERVER, "HTTP stays in web; pass plain values to other packages"),
    "aiohttp.hdrs": (SERVER, "HTTP stays in web; pass plain values to other packages"),
    "yaml": (("config.document",), "ask config.document, which keeps the line of every value"),
    "prometheus_client": (("metrics",), "every metric is defined in metrics.py"),
    "click": (("cli", "commands", "torture.cli"), "return the text; the commands print it"),
    "jwt": (("identity.header_sources",), "signed headers are verified in identity.header_sources"),
    "tiktoken": (("calls.tokenizer",), "counting stays in calls.tokenizer"),
    "time.time": CLOCK,
    "time.time_ns": CLOCK,
    "time.monotonic": CLOCK,
    "time.monotonic_ns": CLOCK,
    "time.perf_counter": CLOCK,
    "time.perf_counter_ns": CLOCK,
    "datetime.datetime.now": CLOCK,
    "datetime.datetime.utcnow": CLOCK,
    "datetime.datetime.today": CLOCK,
    "datetime.date.today": CLOCK,
    "os.environ": ENVIRONMENT,
    "os.getenv": ENVIRONMENT,
}

# rule → {where: reason}. Only for what is better this way; "no time" is no reason.
EXEMPT: dict[str, dict[str, str]] = {
    "too_many_parameters": {
        "server.__init__": "it builds all parts, so everything that no part can make comes in here",
        "commands.admin_keys.admin_keys_create": "each option of a command is a parameter",
        "commands.counters.grant": "each option of a command is a parameter",
        "commands.counters.grants_list": "each option of a command is a parameter",
        "commands.counters.reset": "each option of a command is a parameter",
        "commands.directory.keys_create": "each option of a command is a parameter",
        "commands.directory.users_set": "each option of a command is a parameter",
        "commands.reports.audit": "each option of a command is a parameter",
        "commands.reports.usage": "each option of a command is a parameter",
    },
}


class LongModule(UserWarning):
    """A module that has more lines than one idea usually needs."""


# ------------------------------------------------------------------------------------------------- reading the source


@cache
def modules() -> tuple[str, ...]:
    """Each module below `proxy/`, with dots, without `proxy`; a package stands for its `__init__`."""
    paths = sorted(path.relative_to(SOURCE).with_suffix("") for path in SOURCE.rglob("*.py"))
    return tuple(".".join(part for part in path.parts if part != "__init__") for path in paths)


def path_of(module: str) -> Path:
    path = SOURCE.joinpath(*module.split(".")) if module else SOURCE
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def source(module: str) -> str:
    return path_of(module).read_text(encoding="utf-8")


@cache
def tree(module: str) -> ast.Module:
    return parsed(source(module))


def is_in(module: str, places: tuple[str, ...] | list[str]) -> bool:
    """Whether a module is one of these, or in one of these packages."""
    return any(module == place or module.startswith(f"{place}.") for place in places)


def imports_of(module: str) -> Iterator[tuple[str, str, int]]:
    """Each import, also inside functions, as (name it has here, dotted name of what it is, line)."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                # `import a.b` binds `a`; `import a.b as c` binds the whole.
                bound = alias.asname or alias.name.partition(".")[0]
                yield bound, alias.name if alias.asname else bound, node.lineno
                yield "", alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module or ''}.{alias.name}", node.lineno


def names_of(module: str) -> Iterator[tuple[str, int]]:
    """Every dotted name that stems from an import, with its line.

    After `from datetime import datetime`, `datetime.now` is `datetime.datetime.now`.
    """
    origins: dict[str, str] = {}
    for bound, name, line in imports_of(module):
        if bound:
            origins[bound] = name
        yield name, line
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            if first in origins:
                yield ".".join([origins[first], *rest]), node.lineno


def functions_of(module: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{module}.{node.name}", node


def rule_for(name: str) -> tuple[tuple[str, ...], str] | None:
    """The row of NAMED_ONLY_IN for a dotted name: `aiohttp.web_request.Request` falls under `aiohttp.web`."""
    fitting = [
        prefix
        for prefix in NAMED_ONLY_IN
        if name == prefix
        or name.startswith(f"{prefix}.")
        or (prefix == "aiohttp.web" and name.startswith(f"{prefix}_"))
    ]
    return NAMED_ONLY_IN[max(fitting, key=len)] if fitting else None


# ---------------------------------------------------------------------------------------------------------- the rules


def names_out_of_place() -> Iterator[tuple[str, str]]:
    for module in modules():
        for name, line in names_of(module):
            rule = rule_for(name)
            if rule and not is_in(module, rule[0]):
                yield f"{module}: {name}", f"proxy.{module}:{line} names {name}: {rule[1]}"


def impure_modules() -> Iterator[tuple[str, str]]:
    for module in modules():
        if not is_in(module, PURE):
            continue
        for _, name, line in imports_of(module):
            if name.partition(".")[0] in NOT_IN_PURE:
                yield (
                    f"{module}: {name}",
                    f"proxy.{module}:{line} imports {name}, but it is pure: "
                    "return a value here and do the I/O in a higher package",
                )
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith) and not _is_protocol(
                module, node
            ):
                yield (
                    f"{module}: async",
                    f"proxy.{module}:{node.lineno} awaits, but it is pure: "
                    "return a value here and do the I/O in a higher package",
                )


def _is_protocol(module: str, node: ast.AST) -> bool:
    """Whether a node is inside a Protocol, which only describes what others do."""
    protocols = [
        each
        for each in ast.walk(tree(module))
        if isinstance(each, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in each.bases)
    ]
    return any(node in ast.walk(protocol) for protocol in protocols)


def modules_too_long() -> Iterator[tuple[str, str]]:
    for module in modules():
        lines = len(source(module).splitlines())
        if lines > LINES_MAX:
            yield (
                module,
                f"proxy.{module} has {lines} lines of {LINES_MAX}: it has become two ideas, make them two modules",
            )


def functions_too_long() -> Iterator[tuple[str, str]]:
    for module in modules():
        for name, node in functions_of(module):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield (
                    name,
                    f"proxy.{module}:{node.lineno} {node.name} has {lines} lines of {FUNCTION_LINES_MAX}: "
                    "give its steps names",
                )


def too_many_parameters() -> Iterator[tuple[str, str]]:
    for module in modules():
        for name, node in functions_of(module):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in {"self", "cls"} for argument in given)
            if count > PARAMETERS_MAX:
                yield (
                    name,
                    f"proxy.{module}:{node.lineno} {node.name} has {count} parameters of {PARAMETERS_MAX}: "
                    "those that always travel together are one value",
                )


def modules_without_a_docstring() -> Iterator[tuple[str, str]]:
    for module in modules():
        if not ast.get_docstring(tree(module)):
            yield module, f"proxy.{module} does not say what it promises: start it with a docstring"


def packages_with_code() -> Iterator[tuple[str, str]]:
    for module in modules():
        if path_of(module).name == "__init__.py" and module and len(tree(module).body) > 1:
            yield module, f"proxy/{module}/__init__.py has code: it is the package's docstring and nothing else"


RULES = (
    names_out_of_place,
    impure_modules,
    modules_too_long,
    functions_too_long,
    too_many_parameters,
    modules_without_a_docstring,
    packages_with_code,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_rule_holds(rule):
    """Nothing breaks the rule but what EXEMPT names."""
    exempt = EXEMPT.get(rule.__name__, {})
    broken = [what for where, what in rule() if where not in exempt]
    if broken:
        pytest.fail("\n".join(broken), pytrace=False)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_exemption_is_stale(rule):
    """What no longer breaks a rule must leave EXEMPT, so that it can't break the rule again unseen."""
    stale = EXEMPT.get(rule.__name__, {}).keys() - {where for where, _ in rule()}
    assert not stale, f"delete from EXEMPT[{rule.__name__!r}]: {sorted(stale)}"


def test_exemptions_are_of_rules_that_exist_and_give_a_reason():
    """An exemption of a rule that was renamed would exempt nothing and never be found stale."""
    assert EXEMPT.keys() <= {rule.__name__ for rule in RULES}
    assert all(reason.strip() for reasons in EXEMPT.values() for reason in reasons.values())


def test_the_places_that_the_rules_name_exist():
    """A rule about a module that was renamed would protect nothing."""
    places = [*PURE, *(place for allowed, _ in NAMED_ONLY_IN.values() for place in allowed)]
    assert not [place for place in places if not any(is_in(module, [place]) for module in modules())]


def test_long_modules_are_named():
    """A warning, no failure: a module of more than 500 lines may be one idea, but somebody should look."""
    for module in modules():
        lines = len(source(module).splitlines())
        if LINES_WARNED < lines <= LINES_MAX:
            warnings.warn(f"proxy.{module} has {lines} lines: is it still one idea?", LongModule, stacklevel=1)


# ------------------------------------------------------------------------------------- the rules see what they should


def dummy(monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """Let the rules read these texts in place of the package; `ledger__sqlite` is the module `ledger.sqlite`."""
    given = {name.replace("__", "."): text for name, text in texts.items()}
    monkeypatch.setattr(f"{__name__}.modules", lambda: tuple(given))
    monkeypatch.setattr(f"{__name__}.source", lambda module: given[module])
    trees = {module: parsed(text) for module, text in given.items()}
    monkeypatch.setattr(f"{__name__}.tree", trees.__getitem__)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import time\ntime.time()", "time.time"),
        ("from time import monotonic as tick", "time.monotonic"),
        ("import datetime as dt\ndt.datetime.now(dt.UTC)", "datetime.datetime.now"),
        ("from datetime import datetime\nclock = datetime.now", "datetime.datetime.now"),
        ("import os\nos.environ['HOME']", "os.environ"),
        ("from aiohttp import ClientSession", "aiohttp.ClientSession"),
        ("from aiohttp.web_request import Request", "aiohttp.web_request.Request"),
        ("from sqlalchemy.exc import DBAPIError", "sqlalchemy.exc.DBAPIError"),
        ("def late():\n    import yaml", "yaml"),
    ],
)
def test_a_name_out_of_place_is_seen_however_it_is_imported(monkeypatch, text, name):
    """A clock under another name is still a clock."""
    dummy(monkeypatch, config__reload=text)
    assert f"config.reload: {name}" in {where for where, _ in names_out_of_place()}


def test_web_has_the_server_and_upstreams_the_client(monkeypatch):
    """Two halves of one library: neither package may use the other's half."""
    server, client = "from aiohttp import web\nweb.Response", "from aiohttp import ClientSession, ClientTimeout"
    dummy(monkeypatch, web__routes=server, upstreams__sending=client)
    assert not list(names_out_of_place())
    dummy(monkeypatch, web__routes=client, upstreams__sending=server)
    assert {where.partition(":")[0] for where, _ in names_out_of_place()} == {"web.routes", "upstreams.sending"}


def test_the_limits_of_size_count_what_they_say(monkeypatch):
    """Exactly at the limit is within it; self is no parameter."""
    body = "    pass\n"
    fits = "def f(a, b, *, c, d, e, g):\n" + body * (FUNCTION_LINES_MAX - 1)
    over = "class C:\n def f(self, a, b, *, c, d, e, g, h):\n" + body * FUNCTION_LINES_MAX
    dummy(monkeypatch, a__fits=fits, a__over=over, b__fits="\n" * LINES_MAX, b__over="\n" * (LINES_MAX + 1))
    assert [where for where, _ in functions_too_long()] == ["a.over.f"]
    assert [where for where, _ in too_many_parameters()] == ["a.over.f"]
    assert [where for where, _ in modules_too_long()] == ["b.over"]


def test_pure_modules_may_not_wait(monkeypatch):
    """Neither by a library nor by the language; a Protocol only describes what others do."""
    described = "class P(Protocol):\n    async def f(self): ..."
    dummy(
        monkeypatch,
        formats__sse="import asyncio",
        formats__meter="async def feed(): ...",
        policy__quota=described,
        ledger__ledger="import asyncio",
    )
    assert {where for where, _ in impure_modules()} == {"formats.sse: asyncio", "formats.meter: async"}


# -------------------------------------------------------------------------------------------------------- the threats


NOT_BUILT = "(not built yet:"


def threats() -> dict[str, str]:
    """T1 → its row in docs/threats.md."""
    text = (ROOT / "docs" / "threats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*)$", text, flags=re.MULTILINE)
    assert len(dict(rows)) == len(rows), "each row has a number of its own"
    return {f"T{number}": row for number, row in rows}


def named_threats() -> set[str]:
    """The rows that the docstrings of tests name. A range ("T36 to T39") names only its ends."""
    named: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                named.update(re.findall(r"\bT\d+\b", ast.get_docstring(node) or ""))
    return named


def test_each_threat_is_named_by_a_test():
    """A row that no test names may be forgotten, or its test may have been deleted."""
    rows = threats()
    assert len(rows) >= 98
    built = {threat for threat, row in rows.items() if not row.startswith(NOT_BUILT)}
    assert not built - named_threats(), "name these rows in the docstring of the test that shows them, or write it"
    assert not named_threats() - built, "these rows do not exist, or are marked as not built"


# ------------------------------------------------------------------------------------------------------- benchmarks


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_a_benchmark_can_be_imported(name):
    """No test runs them, so nothing else shows that a name has moved that they import."""
    importlib.import_module(f"benchmarks.{name}")


# ---------------------------------------------------------------------------------------------------------- the locks


CLIENTS_LOCK = "tests/clients/requirements.lock"


def locked(lock: str) -> dict[str, str]:
    """name → version, of what a lock names."""
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / lock).read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.mark.parametrize(
    "lock", ["requirements.lock", "requirements-run.lock", CLIENTS_LOCK, "tests/model_server.lock"]
)
def test_a_lock_has_hashes_and_no_address(lock):
    """T98: what is installed is what was tested, wherever it is fetched from."""
    text = (ROOT / lock).read_text(encoding="utf-8")
    entries = re.split(r"\n(?=[a-z0-9])", text.strip())
    assert all("--hash=sha256:" in entry for entry in entries), "make lock"
    assert len(entries) == len(locked(lock)), "make lock: something is not pinned"
    assert not re.search(r"://|--(extra-)?index|--find-links|^-", text, flags=re.MULTILINE), (
        "make lock: it names an address"
    )


def test_the_locks_agree():
    """The image runs the versions that the tests ran."""
    assert locked("requirements-run.lock").items() <= locked("requirements.lock").items(), "make lock"


def test_the_locks_name_all_that_pyproject_asks_for():
    """A dependency that was added without `make lock` would be missing from the next fresh .venv."""
    said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, groups = said["project"], said["dependency-groups"]
    extras = project["optional-dependencies"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", requirement)[0].lower() for requirement in requirements}

    shipped = names([*project["dependencies"], *extras["postgres"], *extras["offline"], *extras["build"]])
    assert not shipped - locked("requirements-run.lock").keys(), "make lock"
    assert not (shipped | names(extras["test"])) - locked("requirements.lock").keys(), "make lock"
    assert not names(groups["model-server"]) - locked("tests/model_server.lock").keys(), "make lock"


def test_the_lock_of_node_has_hashes_and_no_address():
    """The SDKs of Node too: exactly these bytes, from wherever npm is told to fetch."""
    folder = ROOT / "tests" / "clients" / "node"
    packages = json.loads((folder / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    asked = json.loads((folder / "package.json").read_text(encoding="utf-8"))["dependencies"]
    assert packages.pop("")["dependencies"] == asked, "make lock"
    assert all(re.fullmatch(r"(npm:[@a-z/-]+@)?\d+\.\d+\.\d+", version) for version in asked.values()), "make lock"
    assert all(package["integrity"].startswith("sha512-") for package in packages.values()), "make lock"
    assert not any("resolved" in package for package in packages.values()), "make lock: it names an address"
