"""YAML text to plain data with places: the one module that names `yaml`.

Reads the parser's events itself instead of letting a loader build objects, so that every value keeps its line, so
that nothing is built that was not asked for, and so that what grows without bound (nesting, aliases of aliases) is
stopped while it is small. Where YAML 1.1 reads something else than a person does (`no`, `010`, `12:30`), that is a
mistake with a sentence of what to write instead, never a guess.

What `${…}` stands for is put into scalars after parsing, so a value can't change the file's structure; it is always
text and never shows in a mistake. All mistakes of a file are gathered; nothing is raised and nothing opened here.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import yaml

from proxy.config.interpolation import Interpolator

BYTES_MAX = 5_000_000
DEPTH_MAX = 32
# Some 50,000 users. Aliases count as often as they are used, so a bomb of them is stopped here.
NODES_MAX = 400_000
_SENTENCE_MAX = 500

KeyPath = tuple[str | int, ...]
Scalar = str | int | bool | None

_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
# Other spellings (1_000, +5, 1.5, 0.5e3) stay text as they are written; the schema says which are numbers.
_INTEGER = re.compile(r"-?[1-9][0-9]{0,17}|0")

# The standard of 1.1 also names y and n, but hardly any reader ever took those for true and false.
_WORDS = re.compile(r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF")
_SIXTIES = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_ANOTHER_BASE = re.compile(r"[-+]?0(?:o?[0-7_]+|x[0-9a-fA-F_]+|b[01_]+|[0-9_]+)")

_TAB_INDENT = re.compile(r"^ *\t", re.MULTILINE)

# The C parser where PyYAML was built with it; its events carry the same marks, ten times as fast.
_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True, order=True)
class Diagnostic:
    """What is wrong on which line, and what to write instead."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


@dataclass(slots=True)
class Node:
    """One value of the file and where it stands; `size` and `height` count what is below it, aliases included."""

    line: int
    value: "Scalar | list[Node] | dict[str, Node]"
    key_lines: dict[str, int] = field(default_factory=dict)
    size: int = 1
    height: int = 1
    is_bad: bool = False
    is_interpolated: bool = False

    def plain(self) -> object:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def scalars(self, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Scalar]]:
        """Every single value below it with its place."""
        if isinstance(self.value, dict | list):
            parts = self.value.items() if isinstance(self.value, dict) else enumerate(self.value)
            for step, node in parts:
                yield from node.scalars((*path, step))
        else:
            yield path, self.value


@dataclass(frozen=True, slots=True)
class Document:
    """What a file says, and on which line. `data` is None where it could not be read at all."""

    name: str
    root: Node = field(repr=False)
    data: dict[str, object] | None = field(repr=False)
    mistakes: tuple[Diagnostic, ...]
    sources: Interpolator = field(repr=False)

    def line(self, path: KeyPath) -> int:
        """The line of this value, or of the nearest thing around it that stands in the file."""
        return self._find(path)[1]

    def is_bad(self, path: KeyPath) -> bool:
        """Whether a mistake about this very value was already noted."""
        return self._find(path)[0].is_bad

    def is_interpolated(self, path: KeyPath) -> bool:
        """Whether some of it came from the environment or another file."""
        return self._find(path)[0].is_interpolated

    def mistake(self, path: KeyPath, text: str) -> Diagnostic:
        """A mistake at this place."""
        return Diagnostic(self.name, self.line(path), _shown(text, self.sources))

    def scalars(self) -> Iterator[tuple[KeyPath, Scalar]]:
        """Every single value of the file with its place."""
        return self.root.scalars()

    def _find(self, path: KeyPath) -> tuple[Node, int]:
        node, line = self.root, self.root.line
        for step in path:
            if isinstance(node.value, dict) and isinstance(step, str) and step in node.value:
                line, node = node.key_lines[step], node.value[step]
            elif isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                line = node.line
            else:
                break
        return node, line


def read_document(source: bytes, name: str, sources: Interpolator) -> Document:
    """Read a file's bytes; never raises: what is wrong is in the document's mistakes."""
    builder = _Builder(sources)
    root = Node(1, None)
    try:
        root = builder.build(_parse(_decode(source)))
    except _Unreadable as unreadable:
        builder.note(unreadable.line, str(unreadable))
    mistakes = tuple(Diagnostic(name, line, _shown(text, sources)) for line, text in builder.mistakes)
    data = root.plain()
    return Document(name, root, data if isinstance(data, dict) else None, mistakes, sources)


def _shown(text: str, sources: Interpolator) -> str:
    """A sentence fit to be printed: on one line, not endless, and without any value that was put in."""
    text = "".join(letter if letter.isprintable() else "?" for letter in sources.redact(text))
    return text if len(text) <= _SENTENCE_MAX else f"{text[:_SENTENCE_MAX]}…"


class _Unreadable(Exception):
    """The rest of the file can't be read."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


def _decode(source: bytes) -> str:
    if len(source) > BYTES_MAX:
        raise _Unreadable(1, f"the file is larger than {BYTES_MAX // 1_000_000} MB; write a smaller one")
    try:
        text = source.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = source.count(b"\n", 0, error.start) + 1
        raise _Unreadable(line, "this is not UTF-8; save the file as UTF-8") from None
    if match := yaml.reader.Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, match.start()) + 1
        raise _Unreadable(line, f"there is a control character (U+{ord(match[0]):04X}) here; remove it")
    if match := _TAB_INDENT.search(text):
        line = text.count("\n", 0, match.start()) + 1
        raise _Unreadable(line, "this line is indented with a tab; write spaces")
    return text


def _parse(text: str) -> Iterable[yaml.Event]:
    try:
        yield from yaml.parse(text, Loader=_PARSER)
    except yaml.MarkedYAMLError as error:
        line = _line_of(error.problem_mark)
        lines = text.splitlines()
        raise _Unreadable(line, _explained(error.problem, lines[line - 1] if line <= len(lines) else "")) from None


def _line_of(mark: object) -> int:
    return int(getattr(mark, "line", 0)) + 1


def _explained(problem: str | None, line: str) -> str:
    """Why the parser gave up, with the likeliest reason that this line shows."""
    if "\t" in line:
        return f"this is not YAML ({problem}); write spaces for the tab"
    if "${" in line:
        return f"this is not YAML ({problem}); inside [ ] and {{ }} put ${{…}} in quotes"
    return f"this is not YAML ({problem}); check the indentation, and put text with : # or brackets in quotes"


@dataclass(slots=True)
class _Open:
    """A mapping or sequence of which the end has not come yet."""

    node: Node
    anchor: str | None
    awaits_key: bool
    key: str | None = None
    key_line: int = 0


class _Builder:
    """Puts nodes together from the parser's events, with a stack of its own: nesting can't overflow ours."""

    def __init__(self, sources: Interpolator) -> None:
        self._sources = sources
        self.mistakes: list[tuple[int, str]] = []
        self._stack: list[_Open] = []
        self._anchors: dict[str, Node] = {}
        self._root: Node | None = None

    def note(self, line: int, text: str) -> None:
        self.mistakes.append((line, text))

    def build(self, events: Iterable[yaml.Event]) -> Node:
        """The top mapping; raises _Unreadable where there is none."""
        for event in events:
            self._take(event)
        if self._root is None or self._root.value is None:
            raise _Unreadable(1, "the file is empty; write at least upstreams, groups and users")
        if not isinstance(self._root.value, dict):
            raise _Unreadable(
                self._root.line, 'the file has to be a mapping; write lines such as "groups:" at its left'
            )
        return self._root

    def _take(self, event: yaml.Event) -> None:
        line = _line_of(event.start_mark)
        match event:
            case yaml.ScalarEvent():
                self._place(self._scalar(event, line), event.anchor)
            case yaml.AliasEvent():
                self._place(self._aliased(event.anchor, line), None, line)
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                self._open(event, line)
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                closed = self._stack.pop()
                self._place(closed.node, closed.anchor)
            case yaml.DocumentStartEvent() if self._root is not None:
                raise _Unreadable(line, "a second document begins here; keep one and remove the ---")

    def _open(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent, line: int) -> None:
        if len(self._stack) >= DEPTH_MAX - 1:
            raise _Unreadable(line, f"this is nested deeper than {DEPTH_MAX} levels; write it flatter")
        is_mapping = isinstance(event, yaml.MappingStartEvent)
        node = Node(line, {} if is_mapping else [])
        if event.tag is not None:
            node.is_bad = True
            self.note(line, "tags (!…) are not read; leave it out")
        self._stack.append(_Open(node, event.anchor, is_mapping))

    def _aliased(self, anchor: str | None, line: int) -> Node:
        node = self._anchors.get(anchor or "")
        if node is None:
            raise _Unreadable(line, f"*{anchor} is used before &{anchor} is complete; write &{anchor} first")
        return node

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> Node:
        text, is_plain = event.value, event.implicit[0]
        is_key = bool(self._stack) and self._stack[-1].awaits_key
        wrong = "tags (!…) are not read; leave it out" if event.tag is not None else _trap(text) if is_plain else None
        if wrong:
            self.note(line, wrong)
            return Node(line, text, is_bad=True)
        if "${" in text and not is_key:
            return self._interpolated(text, line)
        return Node(line, _meaning(text) if is_plain else text)

    def _interpolated(self, text: str, line: int) -> Node:
        found = self._sources.interpolate(text)
        for sentence in found.wrong:
            self.note(line, sentence)
        return Node(line, found.text, is_bad=bool(found.wrong), is_interpolated=found.is_interpolated)

    def _place(self, node: Node, anchor: str | None, line: int | None = None) -> None:
        """Put a complete node where it belongs; `line` is where an alias of it stands."""
        line = line or node.line
        if anchor:
            self._anchors[anchor] = node
        if not self._stack:
            self._root = node
            return
        top = self._stack[-1]
        top.node.size += node.size
        top.node.height = max(top.node.height, node.height + 1)
        if top.node.size > NODES_MAX:
            raise _Unreadable(line, f"there are more than {NODES_MAX:,} values, aliases written out; write fewer")
        if len(self._stack) + node.height > DEPTH_MAX:
            raise _Unreadable(line, f"aliases nest this deeper than {DEPTH_MAX} levels; write it flatter")
        if isinstance(top.node.value, list):
            top.node.value.append(node)
        elif top.awaits_key:
            top.key, top.key_line, top.awaits_key = self._key(node, top.node, line), line, False
        else:
            self._put(top, node)

    def _key(self, node: Node, mapping: Node, line: int) -> str | None:
        """The text of a key; None for one under which nothing can be kept."""
        if isinstance(node.value, bool) or not isinstance(node.value, str | int) or node.value == "":
            self.note(line, 'this key is no name; write a word, in quotes if it is one like "null" or "true"')
            return None
        key = str(node.value)
        if key in mapping.key_lines:
            self.note(line, f'"{key}" is already there on line {mapping.key_lines[key]}; merge the two')
            return None
        return key

    @staticmethod
    def _put(top: _Open, node: Node) -> None:
        assert isinstance(top.node.value, dict)
        if top.key is not None:
            top.node.value[top.key] = node
            top.node.key_lines[top.key] = top.key_line
        top.awaits_key = True


def _trap(text: str) -> str | None:
    """What to write instead of a plain scalar that YAML 1.1 reads as something else than it looks like."""
    if _WORDS.fullmatch(text):
        return (
            f'"{text}" means true or false to some readers; write true or false, or "{text}" in quotes for the word'
        )
    if _SIXTIES.fullmatch(text):
        return f'"{text}" is a number in sixties to some readers; write it in quotes'
    if _ANOTHER_BASE.fullmatch(text):
        return f'"{text}" is not counted in tens by all readers; write it without the 0 in front, or in quotes'
    if text == "<<":
        return "merge keys (<<) are not read; write the keys out"
    return None


def _meaning(text: str) -> Scalar:
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    return int(text) if _INTEGER.fullmatch(text) else text
