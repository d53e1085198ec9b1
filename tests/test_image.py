"""The container image: its steps are played without an engine, and the result serves as its user."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import proxy
from tests.dockerfile import Dockerfile, Image, build, ignored, lay_package
from tests.test_house import locked

ROOT = Path(__file__).resolve().parents[1]
FILE = Dockerfile.parsed((ROOT / "Dockerfile").read_text(encoding="utf-8"))
KEY = "key-of-alice-0123456789abcdef"
QUOTAS = f"""
server: {{api: "127.0.0.1:0", admin: "127.0.0.1:0", prefix: /llm}}
upstreams: {{here: {{base_url: "http://127.0.0.1:1/v1", api_key: none-0123456789}}}}
models: {{gpt-4o: {{upstream: here}}, gpt-4: {{upstream: here}}}}
groups: {{staff: {{quotas: {{daily: {{tokens: 1M, per: day}}}}}}}}
users: {{alice: {{groups: [staff], keys: [{KEY}]}}}}
"""
# The image has 71 MB less than its packages: the library of bpe-openai. Base and Python are not counted.
MEGABYTES_MAX = 130


# ------------------------------------------------------------------------------------------------- what the file says


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="NO GIT CLONE HERE: git lists the files")
def test_the_context_has_what_is_copied_and_nothing_else() -> None:
    """A file that .dockerignore leaves out could not be copied; one more would be sent with each build."""
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    sources = set(FILE.sources())
    assert all((ROOT / source).exists() for source in sources)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    sent = {path for path in tracked if path and not ignored(patterns, path)}
    assert sent == {path for path in tracked if path in sources or path.partition("/")[0] in sources}
    assert ignored(patterns, "proxy/web/__pycache__/a.pyc")
    assert ignored(patterns, "quotas.db")


def test_the_image_says_what_it_is() -> None:
    """Its version is that of the program, it stops as the program does, and no label names a host."""
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', FILE.last("LABEL")))
    assert labels["version"] == proxy.__version__
    assert labels["licenses"] == importlib.metadata.metadata("llm-quota-proxy")["License-Expression"]
    assert labels.keys() == {"title", "description", "licenses", "version"}
    assert FILE.last("STOPSIGNAL") == "SIGTERM"
    assert FILE.last("USER") == "10001:10001"
    assert FILE.all("FROM") == ["${BASE} AS build", "${BASE}"], "the base can be replaced by one with a digest"


def test_a_dockerfile_with_an_instruction_that_is_not_played_is_not_accepted() -> None:
    """Otherwise a step of the image could be left out here without a word."""
    with pytest.raises(ValueError, match="ONBUILD"):
        Dockerfile.parsed("FROM x\nONBUILD RUN rm -rf /")


# --------------------------------------------------------------------------------------------------- the result


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """The image, in a folder that its user can enter; pytest's folders are only for whoever runs it."""
    with tempfile.TemporaryDirectory(prefix="quotas-image-") as folder:
        Path(folder).chmod(0o755)
        yield build(FILE, context=ROOT, root=Path(folder) / "root", before_run=_lay_packages)


def _lay_packages(image: Image, command: str) -> None:
    """Before the step that installs the lock file: lay the files of its packages there, so that pip fetches none.

    They are those of the environment of the tests, which were installed by the same hashes. pip finds each of them in
    the version that the lock file names, or else fetches it.
    """
    if "--require-hashes" not in command:
        return
    (packages,) = (image.root / "opt").glob("*/lib/python3*/site-packages")
    for name in locked("requirements-run.lock"):
        lay_package(name, packages)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_image_has_the_program_and_what_it_needs_and_nothing_else(image: Image, record_property) -> None:
    """No installer, no build tool, no tests, no package that nothing of the program requires."""
    code = "import importlib.metadata as m, json; print(json.dumps([d.metadata['Name'] for d in m.distributions()]))"
    exit_code, printed = image.run(["python", "-c", code])
    assert exit_code == 0, printed
    assert {canonicalize_name(name) for name in json.loads(printed)} == required(
        "llm-quota-proxy", {"postgres", "offline"}
    )
    assert not [path for name in ("pip", "pip3*", "pip-*", "setuptools") for path in image.root.rglob(name)]
    opt = image.root / "opt"
    assert not [path for path in opt.rglob("tests") if path.is_dir()]
    megabytes = sum(path.lstat().st_size for path in opt.rglob("*")) / 1e6
    record_property("megabytes", round(megabytes))
    sys.stdout.write(f"the image adds {megabytes:.0f} MB to its base\n")
    assert megabytes < MEGABYTES_MAX


def required(name: str, extras: set[str]) -> set[str]:
    """A package and all that it requires here."""
    found: set[str] = {canonicalize_name(name)}
    for text in importlib.metadata.requires(name) or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in (extras or {""})):
            found |= required(requirement.name, set(requirement.extras))
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_user_of_the_image_can_write_only_to_its_volumes(image: Image) -> None:
    """So a root that is read-only changes nothing, and what runs there cannot change the program."""
    volumes = image.words("VOLUME")
    assert volumes == ["/data", "/tmp"]
    inside = [path for path in image.root.rglob("*") if not path.is_symlink()]
    fixed = [path for path in inside if path.relative_to(image.root).parts[0] not in ("data", "tmp")]
    assert len(fixed) > 1000
    assert not [path for path in fixed if path.stat().st_mode & 0o022], "only the owner may write"
    if os.geteuid() == 0:
        assert {path.stat().st_uid for path in fixed} == {0}
        assert image.path("/data").stat().st_uid == image.user == 10001


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_image_serves_is_healthy_and_stops(image: Image) -> None:
    """With its own command, on another port, with a prefix, behind HTTP_PROXY; its database is on the volume."""
    quotas = image.path("/etc/llm-quota-proxy/quotas.yaml")
    quotas.parent.mkdir(exist_ok=True)
    quotas.write_text(QUOTAS)
    before = set(image.root.rglob("*"))
    with image.start(image.words("ENTRYPOINT") + image.words("CMD"), stderr=subprocess.PIPE) as process:
        try:
            lines = iter(process.stderr)
            log = []
            while not log or '"serving"' not in log[-1]:
                log.append(next(lines, None) or pytest.fail("".join(log)))
            api = json.loads(log[-1])["api"]
            check = image.words("HEALTHCHECK")
            nowhere = {"HTTP_PROXY": "http://127.0.0.1:1", "http_proxy": "http://127.0.0.1:1"}
            assert image.run(check, {"HEALTH_URL": f"{api}/healthz", **nowhere}) == (0, "")
            assert image.run(check, {"HEALTH_URL": f"{api}/llm/healthz"}) == (0, "")
            assert image.run(check, {"HEALTH_URL": "http://127.0.0.1:1/healthz"})[0] == 1
            assert image.environ["HEALTH_URL"] == "http://127.0.0.1:8080/healthz", "the port of the documentation"
            process.send_signal(signal.Signals[FILE.last("STOPSIGNAL")])
            log += lines
            assert process.wait() == 0, "".join(log)
        finally:
            process.kill()
    made = {path.relative_to(image.root) for path in set(image.root.rglob("*")) - before}
    assert made
    assert all(path.parts[0] in ("data", "tmp") for path in made)
    assert image.path("/data/quotas.db").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_image_has_the_encodings(image: Image) -> None:
    """Of every model that tiktoken knows and that a vendor still serves, without a network."""
    code = """if True:
        import os, socket
        def refuse(*arguments): raise OSError("no network")
        socket.socket.connect = socket.getaddrinfo = refuse
        from tiktoken.model import MODEL_TO_ENCODING as known
        from proxy.calls.tokenizer import Tokenizers, table_folders
        tokenizers = Tokenizers(table_folders(os.environ))
        tokenizers.load(known.values())
        print(*sorted({name for name in known.values() if not tokenizers.is_loaded(name)}))
        tokenizers.close()
    """
    exit_code, printed = image.run(["python", "-c", code])
    assert exit_code == 0, printed
    # Those of GPT-2, GPT-3 and the first Codex, which no vendor serves any more.
    assert printed.splitlines()[-1] == "gpt2 p50k_base p50k_edit r50k_base"
