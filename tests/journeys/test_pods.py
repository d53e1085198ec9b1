"""The containers of config/kubernetes as processes, with the files of their ConfigMaps and Secrets.

docs/kubernetes.md is played with a stand-in for kubectl, which knows the names in the manifests and fails for others.
"""

import asyncio
import base64
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest
import yaml
from openai import AsyncOpenAI, OpenAIError

from proxy.ledger.schema import SCHEMA
from proxy.simulator.server import Simulator
from proxy.simulator.server import serve as serve_simulator
from tests.pod import (
    BUNDLES,
    KUBERNETES,
    SECRETS,
    Bundle,
    Mounts,
    Pod,
    containers,
    read_manifests,
    running,
    started,
    why_not_confined,
)
from tests.postgres import shared
from tests.printed import blocks, run

# Each starts several processes, of which each imports everything: on two cores that others use, that takes its time.
pytestmark = [pytest.mark.journey, pytest.mark.timeout(300)]

HELLO: Any = [{"role": "user", "content": "Hello"}]
ROTATED = "sk-of-the-upstream-rotated-0123"


@asynccontextmanager
async def upstream(key: str = SECRETS["openai-api-key"]) -> AsyncIterator[tuple[Simulator, str]]:
    """A simulated upstream that accepts this key, and its address."""
    simulator = Simulator(key)
    runner, port = await serve_simulator(simulator)
    try:
        yield simulator, f"http://127.0.0.1:{port}/v1"
    finally:
        await runner.cleanup()


def _replaced(url: str, **more: str) -> dict[str, str]:
    """What a sidecar's file needs here: free ports, and the simulator in place of the upstream."""
    return {
        "api: 127.0.0.1:8080": "api: 127.0.0.1:0",
        "admin: 0.0.0.0:8081": "admin: 127.0.0.1:0",
        "https://api.openai.com/v1": url,
        **more,
    }


async def _role(statements: str, role: str) -> dict[str, str]:
    """Make the role and its database as the page says, under other names. Returns what to replace in `database`."""
    for statement in statements.replace("llm_quota", role).replace("'…'", "'any'").strip().splitlines():
        await shared().run(statement)
    folder = parse_qs(urlsplit(shared().url()).query)["host"][0]
    return {
        "//llm_quota:": f"//{role}:",
        "@postgresql:5432/llm_quota?sslmode=require": f"@/{role}?host={folder}",
    }


def _app_environment(bundle: Bundle, pod: Pod) -> dict[str, str]:
    """The environment of the app beside a sidecar, with the port that the proxy has here."""
    (app,) = (each for manifest in bundle for each in containers(manifest) if each["name"] == "app")
    (url,) = (each["value"] for each in app["env"] if each["name"] == "OPENAI_BASE_URL")
    (key,) = (each["valueFrom"]["secretKeyRef"]["key"] for each in app["env"] if each["name"] == "OPENAI_API_KEY")
    return {"base_url": url.replace("http://127.0.0.1:8080", pod.api), "api_key": SECRETS[key]}


async def _probe(bundle: Bundle, pod: Pod) -> None:
    """Send each probe of the manifest, as the kubelet does: to an IP address, without a key."""
    probed = 0
    ours = (each for manifest in bundle for each in containers(manifest) if "startupProbe" in each)
    async with aiohttp.ClientSession() as http:
        for container in ours:
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                if kind in container:
                    get = container[kind]["httpGet"]
                    async with http.get(pod.url_of(ports[get["port"]]) + get["path"]) as response:
                        assert response.status == 200, (kind, await response.text())
                    probed += 1
    assert probed >= 2


async def _limit(sdk: AsyncOpenAI, quota: str) -> int:
    quotas = await sdk.get("/quota", cast_to=dict[str, Any])
    (found,) = (each for each in quotas["data"] if each["id"] == quota)
    limit: int = found["tokens"]["limit"]
    return limit


@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
async def test_an_app_calls_through_its_sidecar_while_keys_and_quotas_change(name: str, tmp_path: Path) -> None:
    """The Secret is rotated as the kubelet does it; the new key is in force without a restart. So is a new limit."""
    bundle = BUNDLES[name]
    more = (
        {} if name == "sqlite" else await _role(blocks("kubernetes.md", "Many pods with one quota")[0], "of_sidecar")
    )
    async with (
        upstream(ROTATED) as (simulator, url),
        running(bundle, folder=tmp_path, replaced=_replaced(url, **more)) as pod,
        AsyncOpenAI(**_app_environment(bundle, pod), max_retries=0) as sdk,
    ):
        await _probe(bundle, pod)
        with pytest.raises(OpenAIError, match="did not accept the proxy's key"):
            await sdk.chat.completions.create(model="gpt-4o-mini", messages=HELLO)
        assert simulator.requests[-1].headers["authorization"] == f"Bearer {SECRETS['openai-api-key']}"

        pod.mounts.update_secret({**SECRETS, "openai-api-key": ROTATED})
        await pod.logged("policy reloaded")
        answer = await sdk.chat.completions.create(model="gpt-4o-mini", messages=HELLO)
        assert answer.usage and answer.usage.total_tokens > 0

        text = (pod.mounts.config.folder / "quotas.yaml").read_text()
        pod.mounts.config.update({"quotas.yaml": text.replace("tokens: 200k", "tokens: 300k")})
        await pod.logged("policy reloaded", times=2)
        assert await _limit(sdk, "apps/daily") == 300_000


async def test_the_users_of_the_app_have_quotas_of_their_own(tmp_path: Path) -> None:
    """With the section of the page in place of `users`: by a header of the app, and nobody without it."""
    (section,) = blocks("kubernetes.md", "The users of your app")
    (config,) = (each["data"]["quotas.yaml"] for each in BUNDLES["sqlite"] if each["kind"] == "ConfigMap")
    users = config[config.index("users:") :]
    async with (
        upstream() as (_, url),
        running(BUNDLES["sqlite"], folder=tmp_path, replaced={**_replaced(url), users: section}) as pod,
        AsyncOpenAI(**_app_environment(BUNDLES["sqlite"], pod), max_retries=0) as sdk,
    ):
        for user, remaining in (("ann", 200_000), ("ann", 199_999), ("ben", 200_000)):
            answer = await sdk.chat.completions.with_raw_response.create(
                model="gpt-4o-mini", messages=HELLO, max_tokens=10, extra_headers={"X-App-User": user}
            )
            assert int(answer.headers["x-ratelimit-remaining-tokens"]) < remaining
            if user == "ann":
                first = int(answer.headers["x-ratelimit-remaining-tokens"])
            else:
                assert int(answer.headers["x-ratelimit-remaining-tokens"]) > first, "ben has what ann has used"
        with pytest.raises(OpenAIError, match="401"):
            await sdk.chat.completions.create(model="gpt-4o-mini", messages=HELLO)


async def test_nothing_is_written_but_to_the_volumes(tmp_path: Path) -> None:
    """With a read-only root and without capabilities: an upload through a file, and a restart with what was used."""
    if reason := why_not_confined():
        pytest.skip(f"NO READ-ONLY ROOT HERE, so this is not tested: {reason}")
    bundle, price = BUNDLES["sqlite"], {"gpt-4o-mini: {": "gpt-4o-mini: {tokens_per_request: 100, "}
    async with (
        upstream() as (_, url),
        running(bundle, folder=tmp_path, replaced={**_replaced(url), **price}, is_confined=True) as pod,
    ):
        assert _is_confined(pod), "the root is not read-only, so this test shows nothing"
        async with AsyncOpenAI(**_app_environment(bundle, pod), max_retries=0) as sdk:
            await sdk.audio.transcriptions.create(model="gpt-4o-mini", file=("a.wav", b"\0" * 1_000_000))
            used = await sdk.get("/quota", cast_to=dict[str, Any])
        pod.process.terminate()
        await pod.process.wait()
        async with (
            started(pod.mounts, is_confined=True) as again,
            AsyncOpenAI(**_app_environment(bundle, again), max_retries=0) as sdk,
        ):
            assert (await sdk.get("/quota", cast_to=dict[str, Any]))["data"] == used["data"]
    assert used["data"][0]["tokens"]["used"] > 0


def _is_confined(pod: Pod) -> bool:
    """Whether the process has no capabilities, and sees /etc on a file system that can't be written."""
    folder = Path(f"/proc/{pod.process.pid}")
    options = {
        line.split()[4]: line.split()[5].split(",") for line in (folder / "mountinfo").read_text().splitlines()
    }
    has_none = "\nCapEff:\t0000000000000000\n" in (folder / "status").read_text()
    return has_none and "ro" in options.get("/etc", options["/"])


async def test_the_job_migrates_the_database_of_the_service(tmp_path: Path) -> None:
    """It ends with exit code 0, and the tables are there."""
    bundle = BUNDLES["service"]
    more = await _role(blocks("kubernetes.md", "Many pods with one quota")[0], "of_job")
    (job,) = (each for manifest in bundle if manifest["kind"] == "Job" for each in containers(manifest))
    mounts = Mounts(bundle, job, folder=tmp_path, replaced=more)
    process = await asyncio.create_subprocess_exec(*mounts.command, env=mounts.environ, cwd=mounts.writable[0])
    assert await process.wait() == 0
    url = shared().url("of_job")
    assert await shared().run(f"SELECT * FROM {SCHEMA}.directory", url=url)


async def test_the_service_takes_new_keys(tmp_path: Path) -> None:
    """Those of its Secret while it runs: alice's is rotated. Those of the database: bob is added as on the page."""
    bundle = BUNDLES["service"]
    more = await _role(blocks("kubernetes.md", "Many pods with one quota")[0], "of_service")
    async with upstream() as (_, url):
        replaced = _replaced(url, **more, **{"shutdown_delay: 15s": "shutdown_delay: 0s"})
        del replaced["api: 127.0.0.1:8080"]
        replaced["api: 0.0.0.0:8080"] = "api: 127.0.0.1:0"
        (tmp_path / "pod").mkdir()
        async with running(bundle, folder=tmp_path / "pod", replaced=replaced) as pod:
            await _probe(bundle, pod)
            await _call(pod, SECRETS["alice-key"])
            changed = "key-of-alice-rotated-0123456789"
            pod.mounts.update_secret({**SECRETS, "alice-key": changed})
            await pod.logged("policy reloaded")
            with pytest.raises(OpenAIError, match="401"):
                await _call(pod, SECRETS["alice-key"])
            await _call(pod, changed)
            kubectl = Kubectl(tmp_path, pod, bundle)
            (added,) = [block for block in blocks("kubernetes.md", "Deploy the service") if "users add" in block]
            key = re.search(r"lqp_\w+", await kubectl.play(added))
            assert key
            await _call(pod, key[0])


async def _call(pod: Pod, key: str) -> None:
    async with AsyncOpenAI(base_url=f"{pod.api}/v1", api_key=key, max_retries=0) as sdk:
        await sdk.chat.completions.create(model="gpt-4o-mini", messages=HELLO, max_tokens=10)


async def test_the_placeholders_of_the_secret_are_refused(tmp_path: Path) -> None:
    """Whoever forgets to replace them gets an error for each key, and no proxy with a key that everybody knows."""
    bundle = BUNDLES["service"]
    (job,) = (each for manifest in bundle if manifest["kind"] == "Job" for each in containers(manifest))
    (example,) = (each["stringData"] for each in bundle if each["kind"] == "Secret")
    mounts = Mounts(bundle, job, folder=tmp_path, secrets=example)
    process = await asyncio.create_subprocess_exec(
        *mounts.command, env=mounts.environ, cwd=mounts.writable[0], stderr=asyncio.subprocess.PIPE
    )
    _, printed = await process.communicate()
    assert process.returncode == 2
    assert len(re.findall(rb"quotas\.yaml:\d+: .*24", printed)) == 2, printed


# -------------------------------------------------------------------------------------------------------- the page

_KUBECTL = """
import base64, json, os, subprocess, sys
from pathlib import Path

known = json.loads(Path(os.environ["KUBECTL_KNOWS"]).read_text())
state = Path(os.environ["KUBECTL_STATE"])
secret = json.loads(state.read_text()) if state.exists() else {}
words = sys.argv[1:]
command = words.pop(0)

def fail(text):
    sys.exit(f"kubectl {' '.join(sys.argv[1:])}: {text}")

def option(*names):
    values = [words[at + 1] for at, word in enumerate(words) if word in names]
    return values[0] if values else None

def check_names(*names):
    for name in names:
        name in known["names"] or fail(f"no {name}")

if command == "create":
    name = words[2] if words[0] == "secret" else words[1]
    check_names(f"{words[0]}/{name}")
    given = {word.removeprefix("--from-file=") for word in words if word.startswith("--from-file=")}
    read = {key: base64.b64encode(Path(key).read_bytes()).decode() for key in given}
    secret.update(read if words[0] == "secret" else {})
elif command == "patch":
    check_names("/".join(words[:2]))
    if option("--patch-file"):
        Path(option("--patch-file")).exists() or fail("no such file")
    else:
        secret.update(json.loads(option("-p"))["data"])
elif command == "get":
    check_names("/".join(words[:2]))
    print(secret[option("-o").removeprefix("jsonpath={.data.").removesuffix("}")], end="")
elif command == "apply":
    option("-f", "-k") == "-" or Path(option("-f", "-k")).exists() or fail("no such file")
elif command in ("delete", "wait"):
    plain = [word for word in words if not word.startswith("-")]
    if option("-f"):
        Path(option("-f")).exists() or fail("no such file")
    else:
        check_names(*(plain if "/" in plain[0] else ["/".join(plain)]))
elif command == "rollout":
    words[0] in ("status", "restart", "undo") or fail("no such command")
    check_names(words[1])
elif command in ("scale", "logs"):
    check_names(words[0])
elif command == "port-forward":
    check_names(words[0])
    os.execvp("sleep", ["sleep", "100"])
elif command == "exec":
    at = words.index("--")
    container = option("-c")
    check_names(words[0], *([f"container/{container}"] if container else []))
    given = words[at + 1:]
    for path, folder in known["paths"].items():
        given = [word.replace(path, folder) for word in given]
    sys.exit(subprocess.run(given, env={**os.environ, **known["environ"], "PATH": os.environ["PATH"]}).returncode)
else:
    fail("this stand-in does not know it")
if command in ("create", "patch"):  # others may run at the same time, and would read half a file
    state.write_text(json.dumps(secret))
"""


class Kubectl:
    """A stand-in for kubectl. It keeps one Secret, runs what `exec` runs, and knows the names of a bundle."""

    def __init__(self, folder: Path, pod: Pod | None, bundle: Bundle, *, secret: str | None = None) -> None:
        self._bundle = bundle
        is_service = any(each["kind"] == "Ingress" for each in bundle)
        self._secret = secret or ("llm-quota-proxy" if is_service else "my-app-llm-quota-proxy")
        self._folder = folder
        self._programs = folder / "programs"
        self._programs.mkdir()
        program = self._programs / "kubectl"
        program.write_text(f"#!{sys.executable}\n{_KUBECTL}")
        program.chmod(0o755)
        self.know(pod)

    def know(self, pod: Pod | None) -> None:
        """Run what `exec` runs beside this pod from now on."""
        names = {f"{each['kind'].lower()}/{each['metadata']['name']}" for each in self._bundle if "metadata" in each}
        names |= {f"container/{each['name']}" for manifest in self._bundle for each in containers(manifest)}
        names.add(f"secret/{self._secret}")
        claims = {each["metadata"]["name"] for each in self._bundle if each["kind"] == "PersistentVolumeClaim"}
        names |= {f"pvc/{claim}" for claim in claims}
        for each in (each for each in self._bundle if each["kind"] == "StatefulSet"):
            pod_name = f"{each['metadata']['name']}-0"
            claims = {claim["metadata"]["name"] for claim in each["spec"]["volumeClaimTemplates"]}
            names |= {pod_name, f"pod/{pod_name}", *(f"pvc/{claim}-{pod_name}" for claim in claims)}
        known = {
            "names": sorted(names),
            "paths": {path: pod.mounts.local(path) for path in ("/etc/llm-quota-proxy", "/data")} if pod else {},
            "environ": pod.mounts.environ if pod else {},
        }
        (self._folder / "known.json").write_text(json.dumps(known))

    @property
    def secret(self) -> dict[str, str]:
        """The keys of the Secret; none before a command has made it."""
        file = self._folder / "state.json"
        state = json.loads(file.read_text()) if file.exists() else {}
        return {key: base64.b64decode(value).decode() for key, value in state.items()}

    async def play(self, block: str, replaced: Mapping[str, str] | None = None) -> str:
        """Run the commands of a block in the folder, beside the running loop, and return what they print."""
        for old, new in (replaced or {}).items():
            assert old in block
            block = block.replace(old, new)
        scripts = str(Path(sys.executable).parent)
        environ = {
            "PATH": os.pathsep.join((str(self._programs), scripts, os.environ["PATH"])),
            "KUBECTL_KNOWS": str(self._folder / "known.json"),
            "KUBECTL_STATE": str(self._folder / "state.json"),
        }
        return await asyncio.to_thread(run, block, folder=self._folder, environ=environ)


async def test_the_page_names_what_the_manifests_have(tmp_path: Path) -> None:
    """Its other commands: the Secret of each has the keys that the manifests read, and every name exists."""
    played = {
        "sqlite": (["Take it out, or take another version"], set()),
        "postgresql": (["Many pods with one quota"], SECRETS.keys() - {"admin-key", "alice-key"}),
        "service": (["Deploy the service", "Upgrade and migrations"], SECRETS.keys() - {"app-key"}),
    }
    for name, (headings, keys) in played.items():
        folder = tmp_path / name
        folder.mkdir()
        for given in (f"{name}.yaml", "openai-api-key", "database-password"):
            (folder / given).write_text("given")
        kubectl = Kubectl(folder, None, BUNDLES[name])
        found = [block for heading in headings for block in blocks("kubernetes.md", heading) if "chat" not in block]
        commands = [
            block for block in found if "kubectl" in block and "port-forward" not in block and "exec" not in block
        ]
        assert len(commands) >= len(headings)
        for block in commands:
            await kubectl.play(block)
        assert kubectl.secret.keys() == keys


async def test_the_counters_move_to_postgresql(tmp_path: Path) -> None:
    """The Job copies what the pod of SQLite has counted, and a pod on PostgreSQL goes on with it."""
    (job,) = read_manifests(KUBERNETES / "sidecar" / "copy-database.yaml")
    (container,) = containers(job)
    more = await _role(blocks("kubernetes.md", "Many pods with one quota")[0], "of_copy")
    (old, new) = (tmp_path / name for name in ("old", "new"))
    for folder in (old, new, tmp_path / "job"):
        folder.mkdir()
    async with upstream() as (_, url):
        async with running(BUNDLES["sqlite"], folder=old, replaced=_replaced(url)) as pod:
            await _call(pod, SECRETS["app-key"])
            before = await _used(pod)
        mounts = Mounts([job], container, folder=tmp_path / "job")
        shutil.copytree(old / "llm-data", mounts.local("/data"), dirs_exist_ok=True)
        command = mounts.command
        for text, other in more.items():
            command = [word.replace(text, other) for word in command]
        process = await asyncio.create_subprocess_exec(*command, env=mounts.environ, cwd=mounts.writable[0])
        assert await process.wait() == 0
        async with running(BUNDLES["postgresql"], folder=new, replaced=_replaced(url, **more)) as pod:
            after = await _used(pod)
    assert after == before
    assert before["apps/daily"] > 0


async def _used(pod: Pod) -> dict[str, int]:
    async with AsyncOpenAI(base_url=f"{pod.api}/v1", api_key=SECRETS["app-key"], max_retries=0) as sdk:
        quotas = await sdk.get("/quota", cast_to=dict[str, Any])
    return {each["id"]: each["tokens"]["used"] for each in quotas["data"]}


async def test_the_page_adds_the_proxy_to_an_app_and_takes_it_out(tmp_path: Path) -> None:
    """To a Deployment that exists: both files are made as printed, and every name that a command has is in them."""
    sidecar = str(KUBERNETES / "sidecar")
    sqlite, _, deploy = blocks("kubernetes.md", "Add it to a Deployment that exists")
    run(sqlite, folder=tmp_path, environ={"SIDECAR": sidecar})
    (tmp_path / "openai-api-key").write_text("given")
    app = {"kind": "Deployment", "metadata": {"name": "chat"}}
    kubectl = Kubectl(
        tmp_path, None, [*read_manifests(tmp_path / "existing.yaml"), app], secret="chat-llm-quota-proxy"
    )
    await kubectl.play(deploy)
    assert kubectl.secret.keys() == {"openai-api-key", "app-key"}
    out, _ = blocks("kubernetes.md", "Take it out, or take another version")
    await kubectl.play(out)


async def test_the_page_moves_the_sidecar_to_postgresql(tmp_path: Path) -> None:
    """The password is added to the Secret that exists. Every name is in the old manifest, the new one or the Job."""
    (job,) = read_manifests(KUBERNETES / "sidecar" / "copy-database.yaml")
    kubectl = Kubectl(tmp_path, None, [*BUNDLES["sqlite"], *BUNDLES["postgresql"], job])
    for given in ("copy-database.yaml", "postgresql.yaml", "database-password"):
        (tmp_path / given).write_text("given")
    for block in blocks("kubernetes.md", "From SQLite to PostgreSQL"):
        await kubectl.play(block)
    assert kubectl.secret == {"database-password": "given"}


async def test_the_page_deploys_the_sidecar(tmp_path: Path) -> None:
    """Each command from the Secret to the rotated key, as printed, on the files of the manifest."""
    bundle = BUNDLES["sqlite"]
    (tmp_path / "sqlite.yaml").write_text(yaml.safe_dump_all(bundle))
    (tmp_path / "openai-api-key").write_text(f"{SECRETS['openai-api-key']}\n")
    kubectl = Kubectl(tmp_path, None, bundle)
    deploy, _ = blocks("kubernetes.md", "Deploy it")
    await kubectl.play(deploy)
    assert kubectl.secret.keys() == {"openai-api-key", "app-key"}
    assert not (tmp_path / "app-key").exists()
    (tmp_path / "pod").mkdir()
    async with (
        upstream() as (simulator, url),
        running(bundle, folder=tmp_path / "pod", secrets=kubectl.secret, replaced=_replaced(url)) as pod,
    ):
        kubectl.know(pod)
        check, shown, refused = blocks("kubernetes.md", "See that it works")
        printed = await kubectl.play(check, {"http://127.0.0.1:18080": pod.api})
        assert printed.startswith("HTTP/1.1 200 OK")
        headers = re.findall(r"(?m)^([a-z-]+): ", shown)
        assert len(headers) == 5
        assert all(f"\n{header}: " in printed.replace("\r", "") for header in headers)
        await _assert_refusal_is_as_shown(pod, kubectl.secret["app-key"], refused)

        usage, table, _ = blocks("kubernetes.md", "See what was used")
        printed = await kubectl.play(usage)
        assert re.search(r"(?m)^my-app +1 ", printed)
        assert table.splitlines()[0].split() in [line.split() for line in printed.splitlines()], printed

        (backup,) = blocks("kubernetes.md", "Where the counters are")
        await kubectl.play(backup)
        assert (tmp_path / "backup.db").read_bytes().startswith(b"SQLite format 3")

        (tmp_path / "openai-api-key").write_text(ROTATED)
        _, configmap, rotate, restart = blocks("kubernetes.md", "Change quotas and keys")
        (tmp_path / "quotas.yaml").write_text("")
        await kubectl.play(configmap)
        await kubectl.play(rotate)
        pod.mounts.update_secret(kubectl.secret)
        await pod.logged("policy reloaded", times=2)
        with pytest.raises(OpenAIError):  # the upstream does not know this key
            await _call(pod, kubectl.secret["app-key"])
        assert simulator.requests[-1].headers["authorization"] == f"Bearer {ROTATED}"
        before = kubectl.secret["app-key"]
        await kubectl.play(restart)
        assert kubectl.secret["app-key"] != before


async def _assert_refusal_is_as_shown(pod: Pod, key: str, shown: str) -> None:
    """A call that does not fit has the status, the headers and the members that the page shows."""
    text = (pod.mounts.config.folder / "quotas.yaml").read_text()
    text = text.replace("tokens: 200k", "tokens: 120") + "\nsmallest_answer: 1024\n"  # the latter as with 200k
    pod.mounts.config.update({"quotas.yaml": text})
    await pod.logged("policy reloaded")
    async with AsyncOpenAI(base_url=f"{pod.api}/v1", api_key=key, max_retries=0) as sdk:
        with pytest.raises(OpenAIError) as raised:
            await sdk.chat.completions.create(model="gpt-4o-mini", messages=HELLO, max_tokens=100)
    response: Any = raised.value.response  # type: ignore[attr-defined]
    assert shown.startswith(f"HTTP/1.1 {response.status_code} ")
    assert all(header in response.headers for header in re.findall(r"(?m)^([a-z-]+): ", shown))
    error = response.json()["error"]
    for member in ("type", "code"):
        assert f'"{member}": "{error[member]}"' in shown
    digits = re.compile(r"[\d,]+")
    assert digits.sub("0", error["message"])[:60] in digits.sub("0", shown.replace('\\"', '"'))
