"""The house rules, kept by a test, since taste that nobody checks is lost by the third contributor.

Each rule looks at the source of `proxy/` and names what breaks it, with what to do instead. Where good sense must
break a rule, EXEMPT says so with its reason; an exemption that is no longer needed fails, so the list only shrinks.
"""

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "proxy"

# The table of contents. A module imports only from those that stand before it, also on its own floor.
FLOORS = {
    "ground": (
        "errors windows usage quotas admission books policy standing anthropic auth "  # who may what
        "codings strict_json sse chunks pictures prompt "
        "endpoints forms wire allowance demand habits message_ending ending meter "
        "stream headers failures pace choice".split()
    ),
    "adapters": (
        "references document scalars fields schema json_schema faults config check "  # the file
        "logs tasks tokens tables rows statements store sqlite postgres ledger records "
        "spool upstream metrics client".split()
    ),
    "story": "reload waiting counting reservation passage owned departure tries relay".split(),
    "doors": "answering framing bodies cors listener health api admin".split(),
    "roof": (
        "simulated_faults simulated_text simulated_media simulated_frames simulated_memory simulated_messages "
        "simulator share app workers demo "
        "torture_plan torture_answers torture_records torture_report torture_verdict "
        "torture_books torture_clients torture_upstream torture_proxy torture_replicas torture cli".split()
    ),
}
ORDER = [module for floor in FLOORS.values() for module in floor]
GROUND = FLOORS["ground"]

# Each of these is covered to the last branch by its own test file alone (tests/full_coverage.py).
FULLY_COVERED = [*GROUND, "rows", "store", "sqlite", "postgres", "ledger", "records"]

# The entrance of the package, above the roof: read by nobody, so in no floor.
ENTRANCE = ["__init__", "__main__"]

LINES_MAX = 400
FUNCTION_LINES_MAX = 60
PARAMETERS_MAX = 6

# The ground is pure: no await, no clock, no SQL, no sockets, no files, no log. So it is tested by tables and by a
# thousand random histories.
NOT_IN_GROUND = frozenset(
    "aiohttp aiosqlite alembic asyncio asyncpg logging os pathlib prometheus_client select socket sqlalchemy sqlite3 "
    "ssl structlog subprocess tempfile threading time uvloop yaml".split()
)

SERVER = {
    "client",
    "answering",
    "framing",
    "bodies",
    "cors",
    "listener",
    "health",
    "api",
    "admin",
    "simulator",
    "app",
}
CLOCK = (
    {"app", "cli"},
    "take `now` as a parameter, or a `now` function in the constructor; app.py hands the real one down",
)
ENVIRONMENT = ({"cli"}, "write ${NAME} in the YAML; cli.py hands the environment down to references.py")

# What may be named where: the longest prefix that fits decides. One outside thing has one adapter, which also
# translates its errors, so that the rest of the house never learns its names.
NAMED_ONLY_IN: dict[str, tuple[set[str], str]] = {
    "sqlalchemy": (
        {"tables", "sqlite", "statements", "postgres"},
        "ask the ledger: SQL has one home for each engine",
    ),
    "alembic": ({"tables"}, "ask tables: migrations have one home"),
    "aiosqlite": (set(), "let SQLAlchemy load it, by the database's URL"),
    "asyncpg": ({"postgres", "torture_books"}, "ask the ledger: SQL has one home for each engine"),
    "sqlite3": ({"torture_books"}, "ask the ledger; only torture reads behind its back, to judge it"),
    "aiohttp": (
        {"upstream", "torture_clients"},
        "the client is upstream's, and torture's; for the server write `from aiohttp import web`",
    ),
    "aiohttp.web": (SERVER, "leave HTTP to the doors; hand them plain values"),
    "aiohttp.hdrs": (SERVER | {"upstream"}, "leave HTTP to the doors; hand them plain values"),
    "yaml": ({"document"}, "ask document, which keeps the line of every value"),
    "prometheus_client": ({"metrics"}, "every metric stands in the one list of metrics"),
    "click": ({"cli"}, "return what is to be said; cli says it"),
    "tiktoken": ({"tokens"}, "ask tokens: counting has one home"),
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
        "app.__init__": "the roof makes all parts, so all that no part can make comes in here",
    },
}


# ------------------------------------------------------------------------------------------------- reading the source


@cache
def source(module: str) -> str:
    """The text of a module of ORDER or ENTRANCE; of one that is not written yet, nothing."""
    path = PACKAGE / f"{module}.py"
    return path.read_text(encoding="utf-8") if path.exists() else ""


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(source(module), filename=f"proxy/{module}.py")


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
            origin = "proxy" if node.level else node.module or ""
            if node.level and node.module:
                origin = f"proxy.{node.module}"
            for alias in node.names:
                yield alias.asname or alias.name, f"{origin}.{alias.name}", node.lineno


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


def own_imports_of(module: str) -> Iterator[tuple[str, int]]:
    """The modules of this package that a module imports, with the line."""
    for _, name, line in imports_of(module):
        package, _, rest = name.partition(".")
        if package == "proxy" and rest:
            yield rest.partition(".")[0], line


def functions_of(module: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{module}.{node.name}", node


def rule_for(name: str) -> tuple[set[str], str] | None:
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


def imports_from_above() -> Iterator[tuple[str, str]]:
    for height, module in enumerate(ORDER):
        for imported, line in own_imports_of(module):
            if imported in ORDER[height:]:
                yield (
                    f"{module} → {imported}",
                    f"proxy/{module}.py:{line} imports {imported}, which comes after it in ORDER: "
                    "hand the thing in through the constructor, or move what both need into a module before both",
                )
            elif imported in ENTRANCE:
                yield f"{module} → {imported}", f"proxy/{module}.py:{line}: nothing imports the entrance"


def names_out_of_place() -> Iterator[tuple[str, str]]:
    for module in ORDER:
        for name, line in names_of(module):
            rule = rule_for(name)
            if rule and module not in rule[0]:
                yield f"{module}: {name}", f"proxy/{module}.py:{line} names {name}: {rule[1]}"


def impure_ground() -> Iterator[tuple[str, str]]:
    for module in GROUND:
        for _, name, line in imports_of(module):
            if name.partition(".")[0] in NOT_IN_GROUND:
                yield (
                    f"{module}: {name}",
                    f"proxy/{module}.py:{line} imports {name}, but the ground is pure: decide here, act above",
                )
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith):
                yield (
                    f"{module}: async",
                    f"proxy/{module}.py:{node.lineno} awaits, but the ground is pure: decide here, act above",
                )


def modules_too_long() -> Iterator[tuple[str, str]]:
    for module in ORDER:
        lines = len(source(module).splitlines())
        if lines > LINES_MAX:
            yield (
                module,
                f"proxy/{module}.py has {lines} lines of {LINES_MAX}: it has become two nouns, make them two modules",
            )


def functions_too_long() -> Iterator[tuple[str, str]]:
    for module in ORDER:
        for name, node in functions_of(module):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield (
                    name,
                    f"proxy/{module}.py:{node.lineno} {node.name} has {lines} lines of {FUNCTION_LINES_MAX}: "
                    "give its steps names, or move one into a leaf",
                )


def too_many_parameters() -> Iterator[tuple[str, str]]:
    for module in ORDER:
        for name, node in functions_of(module):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in {"self", "cls"} for argument in given)
            if count > PARAMETERS_MAX:
                yield (
                    name,
                    f"proxy/{module}.py:{node.lineno} {node.name} has {count} parameters of {PARAMETERS_MAX}: "
                    "those that always travel together are one value",
                )


def strangers() -> Iterator[tuple[str, str]]:
    present = {path.stem for path in PACKAGE.glob("*.py")}
    for module in sorted(present - {*ORDER, *ENTRANCE}):
        yield (
            module,
            f"proxy/{module}.py stands in no floor: give it its place in FLOORS, and in CONTRIBUTING.md's table",
        )
    for module in sorted({*ORDER, *ENTRANCE} - present):
        yield module, f"FLOORS names {module}, but there is no proxy/{module}.py: write it or strike it out"


def modules_without_a_test() -> Iterator[tuple[str, str]]:
    for module in ORDER:
        if source(module) and not (ROOT / "tests" / f"test_{module}.py").exists():
            yield (
                module,
                f"proxy/{module}.py has no tests/test_{module}.py: nobody should have to search for its tests",
            )


def modules_without_a_docstring() -> Iterator[tuple[str, str]]:
    for module in [*ORDER, *ENTRANCE]:
        if source(module) and not ast.get_docstring(tree(module)):
            yield module, f"proxy/{module}.py does not say what it promises: open it with a docstring"


def modules_not_in_the_contents() -> Iterator[tuple[str, str]]:
    contents = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for row in re.findall(r"^\| .*", contents.partition("## The house rules")[0], flags=re.MULTILINE):
        if row.count("|") != 3:
            yield row, f"a table in CONTRIBUTING.md has a row that is not of two columns: {row}"
    listed = [name for name in re.findall(r"^\| `(\w+)` \|", contents, flags=re.MULTILINE) if name in ORDER]
    for module in ORDER:
        if module not in listed:
            yield module, f"the table in CONTRIBUTING.md leaves {module} out: add its line"
    if sorted(listed) == sorted(ORDER) and listed != ORDER:
        yield "order", f"the table in CONTRIBUTING.md has another order than FLOORS: {listed}"


RULES = (
    imports_from_above,
    names_out_of_place,
    impure_ground,
    modules_too_long,
    functions_too_long,
    too_many_parameters,
    strangers,
    modules_without_a_test,
    modules_without_a_docstring,
    modules_not_in_the_contents,
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
    """What has been put right leaves EXEMPT, so that it can't break again unseen."""
    stale = EXEMPT.get(rule.__name__, {}).keys() - {where for where, _ in rule()}
    assert not stale, f"strike out of EXEMPT[{rule.__name__!r}]: {sorted(stale)}"


def test_exemptions_are_of_rules_that_exist_and_give_a_reason():
    """An exemption of a rule that was renamed would exempt nothing and never be found stale."""
    assert EXEMPT.keys() <= {rule.__name__ for rule in RULES}
    assert all(reason.strip() for reasons in EXEMPT.values() for reason in reasons.values())


# ------------------------------------------------------------------------------------- the rules see what they should


def dummy(monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    """Let the rules read these texts in place of the package."""
    monkeypatch.setattr(f"{__name__}.source", lambda module: modules.get(module, ""))
    monkeypatch.setattr(f"{__name__}.tree", lambda module: ast.parse(modules.get(module, "")))


@pytest.mark.parametrize(
    "text",
    [
        "from proxy import relay",
        "from proxy.calls.relay import Relay",
        "import proxy.calls.relay",
        "from . import relay",
        "from .relay import Relay as R",
        "def late():\n    from proxy.calls.relay import Relay",
        "import proxy.calls.relay as story",
    ],
)
def test_an_import_from_above_is_seen_however_it_is_written(monkeypatch, text):
    """Relative, renamed or hidden in a function: it is the same import."""
    dummy(monkeypatch, ledger=text)
    assert {where for where, _ in imports_from_above()} == {"ledger → relay"}


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
    dummy(monkeypatch, reload=text)
    assert f"reload: {name}" in {where for where, _ in names_out_of_place()}


def test_the_doors_have_the_server_and_upstream_the_client(monkeypatch):
    """The same library, two adapters: neither may take the other's half."""
    server, client = "from aiohttp import web\nweb.Response", "from aiohttp import ClientSession, ClientTimeout"
    dummy(monkeypatch, api=server, upstream=client)
    assert not list(names_out_of_place())
    dummy(monkeypatch, api=client, upstream=server)
    assert {where.partition(":")[0] for where, _ in names_out_of_place()} == {"api", "upstream"}


def test_the_limits_of_size_count_what_they_say(monkeypatch):
    """Exactly at the limit is within it; self is no parameter."""
    body = "    pass\n"
    fits = "def f(a, b, *, c, d, e, g):\n" + body * (FUNCTION_LINES_MAX - 1)
    over = "class C:\n def f(self, a, b, *, c, d, e, g, h):\n" + body * FUNCTION_LINES_MAX
    dummy(monkeypatch, quotas=fits, policy=over, usage="\n" * LINES_MAX, auth="\n" * (LINES_MAX + 1))
    assert [where for where, _ in functions_too_long()] == ["policy.f"]
    assert [where for where, _ in too_many_parameters()] == ["policy.f"]
    assert [where for where, _ in modules_too_long()] == ["auth"]


def test_the_ground_may_not_wait(monkeypatch):
    """Neither by a library nor by the language."""
    dummy(monkeypatch, wire="import asyncio", meter="async def feed(): ...", ledger="import asyncio")
    assert {where for where, _ in impure_ground()} == {"wire: asyncio", "meter: async"}


# ---------------------------------------------------------------------------------------------------------- the locks


CLIENTS_LOCK = "tests/clients/requirements.lock"


def locked(lock: str) -> dict[str, str]:
    """name → version, of what a lock names."""
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / lock).read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.mark.parametrize(
    "lock", ["requirements.lock", "requirements-run.lock", CLIENTS_LOCK, "tests/model_server.lock"]
)
def test_a_lock_has_hashes_and_no_address(lock):
    """What is installed is what was tested, wherever it is fetched from."""
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
