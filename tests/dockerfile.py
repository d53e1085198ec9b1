"""Plays a Dockerfile without a container engine: for images whose base is Python on Debian.

file = Dockerfile.parsed(path.read_text())
image = build(file, context=ROOT, root=tmp_path / "image")     # runs each step, in its order
image.run(["llm-quota-proxy", "--version"])                    # as its user, in its folder, with its variables

The root of the image is a folder. Paths of the image that begin with one of PATHS are mapped into it. Python's own
folder, /usr/local, is a new virtual environment.
"""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The folders at the top that our image uses.
PATHS = ("opt", "src", "data", "etc", "tmp")
_MAPPED = re.compile(rf"(?<![\w./}}])/(?=(?:{'|'.join(PATHS)})\b)")
_INSTRUCTIONS = frozenset(
    "ARG FROM ENV RUN WORKDIR COPY LABEL USER VOLUME EXPOSE STOPSIGNAL HEALTHCHECK ENTRYPOINT CMD".split()
)


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """The instructions in their order: their name, and what stands after it."""

    instructions: tuple[tuple[str, str], ...]

    @classmethod
    def parsed(cls, text: str) -> "Dockerfile":
        """Raises ValueError for an instruction that is not played here."""
        without_comments = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        lines = without_comments.replace("\\\n", " ").splitlines()
        found = [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]
        unknown = {name for name, _ in found} - _INSTRUCTIONS
        if unknown:
            raise ValueError(f"tests/dockerfile.py does not play {sorted(unknown)}")
        return cls(tuple(found))

    def all(self, name: str) -> list[str]:
        """What stands after each instruction of this name."""
        return [rest for each, rest in self.instructions if each == name]

    def last(self, name: str) -> str:
        """What stands after the last instruction of this name. Raises IndexError if there is none."""
        return self.all(name)[-1]

    def sources(self) -> Iterator[str]:
        """The files and folders of the context that are copied."""
        for rest in self.all("COPY"):
            if "--from=" not in rest:
                yield from shlex.split(rest)[:-1]


@dataclass(slots=True)
class Image:
    """What a stage has when all its instructions are played."""

    root: Path
    environ: dict[str, str]
    folder: str = "/"
    user: int | None = None
    file: Dockerfile = field(default_factory=lambda: Dockerfile(()))

    def mapped(self, text: str) -> str:
        """The text with the image's paths as they are on this machine."""
        return _MAPPED.sub(f"{self.root}/", text)

    def path(self, path: str) -> Path:
        """A path of the image on this machine; a relative one begins at its folder."""
        return Path(self.mapped(os.path.normpath(os.path.join(self.folder, path))))

    def start(self, command: Sequence[str], environ: Mapping[str, str] | None = None, **options: Any) -> Any:
        """Start a command as the image's user, if this is root, else as whoever this is.

        The capability is for the folders above the image and for Python itself, which this user may not be allowed to
        enter. It lets nobody write.
        """
        command = [self.mapped(word) for word in command]
        found = shutil.which(command[0], path=self.environ["PATH"])
        assert found, f"{command[0]} is not in the image"
        user = shlex.split(f"--reuid {self.user} --regid {self.user} --clear-groups")
        capability = shlex.split("--inh-caps +dac_read_search --ambient-caps +dac_read_search")
        is_other = self.user is not None and os.geteuid() == 0
        return subprocess.Popen(
            [*(["setpriv", *user, *capability] if is_other else []), found, *command[1:]],
            cwd=self.path("."),
            env={**self.environ, **(environ or {})},
            stdin=subprocess.DEVNULL,
            text=True,
            umask=0o022,
            **options,
        )

    def run(self, command: Sequence[str], environ: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Run a command to its end. Returns its exit code and all that it printed."""
        with self.start(command, environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            printed, _ = process.communicate()
        return process.returncode, printed

    def words(self, instruction: str) -> list[str]:
        """The words of the last ENTRYPOINT, CMD, VOLUME or HEALTHCHECK, which are written as JSON."""
        rest = self.file.last(instruction)
        return [str(word) for word in json.loads(rest[rest.index("[") :])]


def build(
    file: Dockerfile,
    *,
    context: Path,
    root: Path,
    before_run: Callable[[Image, str], None] = lambda image, command: None,
) -> Image:
    """Play all stages, and return the last one. `before_run` is called before each RUN.

    All stages have the same root, so that paths inside of files, such as the first lines of scripts, stay right when
    a folder is copied from one to the next. Raises AssertionError with the output of a RUN that fails.
    """
    arguments: dict[str, str] = {}
    stages: dict[str, Path] = {}
    name, image = "", Image(root, {})
    for instruction, rest in file.instructions:
        if instruction == "ARG":
            key, _, value = rest.partition("=")
            arguments[key] = value
        elif instruction == "FROM":
            if image.environ:
                stages[name] = root.rename(root.parent / f"{root.name}-{name}")
            name = rest.partition(" AS ")[2]
            source = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], rest.partition(" ")[0])
            assert re.fullmatch(r"python:3\.\d+-slim", source), f"{source} is not played here"
            image = _from(root, file)
        elif instruction == "COPY":
            _copy(image, rest, context=context, stages=stages)
        else:
            _play(image, instruction, rest, before_run=before_run)
    return image


def _from(root: Path, file: Dockerfile) -> Image:
    """A new root with Python and pip, and an empty folder for each of PATHS that every Debian has."""
    for name in ("etc", "opt", "tmp"):
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    python = root / "usr" / "local"
    venv.create(python, symlinks=True)
    (packages,) = python.glob("lib/python3*/site-packages")
    for name in ("pip", "setuptools"):
        lay_package(name, packages)
    # PIP_REQUIRE_VIRTUALENV, because a RUN uninstalls packages: those of this machine must not be meant by mistake.
    environ = {"PATH": f"{python}/bin:/usr/bin:/bin", "PIP_REQUIRE_VIRTUALENV": "1"}
    return Image(root, environ, file=file)


def lay_package(name: str, packages: Path) -> None:
    """Lay the files of a package of this environment, without its scripts, into another folder of packages.

    They are links, because copies of 200 MB would take longer than all else. Raises PackageNotFoundError.
    """
    for file in importlib.metadata.distribution(name).files or ():
        if ".." not in file.parts:
            target = packages / file
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                target.hardlink_to(str(file.locate()))
            except OSError:  # another disk
                shutil.copy(str(file.locate()), target)


def _copy(image: Image, rest: str, *, context: Path, stages: Mapping[str, Path]) -> None:
    *sources, target = shlex.split(rest)
    tree = context
    if sources[0].startswith("--from="):
        tree = stages[sources.pop(0).removeprefix("--from=")]
    for source in sources:
        found = tree / source.lstrip("/")
        at = image.path(target) / found.name if target.endswith("/") else image.path(target)
        if found.is_dir():  # its content, not itself
            shutil.copytree(found, at, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(found, at)


def _play(image: Image, instruction: str, rest: str, *, before_run: Callable[[Image, str], None]) -> None:
    if instruction == "ENV":
        for word in shlex.split(rest):
            key, _, value = word.partition("=")
            image.environ[key] = image.mapped(value).replace("$PATH", image.environ["PATH"])
    elif instruction == "WORKDIR":
        image.folder = rest
        image.path(".").mkdir(parents=True, exist_ok=True)
    elif instruction == "USER":
        image.user = int(rest.partition(":")[0])
    elif instruction == "RUN":
        before_run(image, rest)
        if os.geteuid() != 0:
            rest = re.sub(r"-[og] \d+ ", "", rest)  # only root can give a folder away
        code, printed = image.run(["sh", "-ec", rest])
        assert code == 0, f"RUN {rest}\n{printed}"


def ignored(patterns: str, path: str) -> bool:
    """Whether a .dockerignore leaves a file or folder out of the context: the last pattern that fits decides."""
    result = False
    for line in patterns.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        wanted = pattern.startswith("!")
        expression = re.escape(pattern.removeprefix("!")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(f"{expression}(?:/.*)?", path):
            result = not wanted
    return result
