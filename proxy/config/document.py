"""Reads YAML into plain data and keeps the line of every value. The only module that imports `yaml`.

The document is built from the parser's events, not by one of PyYAML's loaders. Thus every value keeps its line, tags
such as `!!python/object` create nothing, and input that grows without bound (deep nesting, aliases of aliases) is
rejected while it is still small.

YAML 1.1 gives some words and numbers a meaning that a reader does not expect: `no` is false, `010` is 8, `12:30` is
750. Such a value is a mistake with a text that says what to write instead; the proxy never guesses.

`${…}` in a value is interpolated after parsing. An interpolated value is therefore always text, can't change the
file's structure, and is redacted in every diagnostic.

All mistakes of a file are collected. Nothing here opens a file, and `read_document` raises no exception.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import yaml

from proxy.config.interpolation import Interpolator

BYTES_MAX = 5_000_000
DEPTH_MAX = 32
# Enough for about 50,000 users. An alias counts with its full size at every use, which stops alias bombs.
NODES_MAX = 400_000
_TEXT_MAX = 500

# The keys and list indexes that lead to a value: ("users", "alice", "keys", 0).
KeyPath = tuple[str | int, ...]
Scalar = str | int | bool | None

_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
# Other notations (1_000, +5, 1.5, 0.5e3) stay text; the schema decides which of them are numbers. 18 digits fit
# into 64 bits.
_INTEGER = re.compile(r"-?[1-9][0-9]{0,17}|0")

# YAML 1.1 also lists y and n as booleans, but hardly any parser ever implemented those two.
_BOOLEAN_WORDS = re.compile(r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF")
# Base 60: a YAML 1.1 parser reads 12:30 as 12 * 60 + 30 = 750. An address such as 127.0.0.1:8080 does not match.
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
# Octal (010 and 0o10, both 8), hexadecimal (0x1F) and binary (0b11); also 09, which is decimal to some parsers only.
_NOT_DECIMAL = re.compile(r"[-+]?0(?:o?[0-7_]+|x[0-9a-fA-F_]+|b[01_]+|[0-9_]+)")

_TAB_INDENT = re.compile(r"^ *\t", re.MULTILINE)
# The first line of other formats: a table of TOML, or `name = value` of TOML, INI and files of variables.
_TOML = re.compile(r"\[[\w.\"-]+\]\s*(?:#.*)?|(?:export )?[\w.-]+ *= *\S.*")
_MARKUP = re.compile(r"<[!?A-Za-z]")
# A pattern that begins with an asterisk and is not in quotes, which YAML reads as an alias.
_BARE_PATTERN = re.compile(r"(?:^|[\[{,:-])\s*\*")
_NOT_YAML = (
    "this is not YAML: it begins with [name] or name = value; write name: value, and indent what is in a section"
)
_TAG_MISTAKE = "YAML tags (!…) are not supported; remove the tag"

# The C parser, if PyYAML was built with it. It emits the same events with the same lines, ten times as fast.
_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_WRITER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def path_text(path: KeyPath) -> str:
    """A key path as people write it: `users.alice.keys[1]`.

    Names of admin keys are left out. An operator who writes `{key: name}` instead of `{name: key}` has a key there.
    """
    shown = (*path[:1], *path[2:]) if path[:1] == ("admin_keys",) else path
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in shown).removeprefix(".")


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found at a key path: a mistake or a warning, and what to write instead."""

    path: KeyPath
    text: str


@dataclass(frozen=True, slots=True, order=True)
class Diagnostic:
    """A mistake or a warning with its file and its line, counted from 1.

    `path` is its key path, as in `users.alice.keys[1]`; empty if it is about the file or about its syntax.
    """

    file: str
    line: int
    text: str
    path: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


@dataclass(slots=True)
class Node:
    """One value and the line on which it begins.

    `key_lines` has the line of each key of a mapping. `size` counts the values of the subtree, itself included, and
    `height` its levels; both count an aliased value in full.
    """

    line: int
    value: "Scalar | list[Node] | dict[str, Node]"
    key_lines: dict[str, int] = field(default_factory=dict)
    size: int = 1
    height: int = 1
    is_bad: bool = False
    is_interpolated: bool = False

    def plain(self) -> object:
        """The value as dicts, lists and scalars, without lines."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def walk(self, path: KeyPath = ()) -> Iterator[tuple[KeyPath, "Node"]]:
        """Every value in the subtree with its key path, mappings and lists before their content."""
        yield path, self
        if isinstance(self.value, dict | list):
            children = self.value.items() if isinstance(self.value, dict) else enumerate(self.value)
            for step, node in children:
                yield from node.walk((*path, step))


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file. `data` is None if the file has no readable top-level mapping. `warnings` stop no start."""

    name: str
    root: Node = field(repr=False)
    data: dict[str, object] | None = field(repr=False)
    mistakes: tuple[Diagnostic, ...]
    warnings: tuple[Diagnostic, ...]
    interpolator: Interpolator = field(repr=False)

    def line(self, path: KeyPath) -> int:
        """The line of this value. If there is none, the line of the closest enclosing value."""
        return self._find(path)[1]

    def is_bad(self, path: KeyPath) -> bool:
        """Whether the document has reported a mistake about this value."""
        return self._find(path)[0].is_bad

    def is_interpolated(self, path: KeyPath) -> bool:
        """Whether a part of this value came from the environment or from another file."""
        return self._find(path)[0].is_interpolated

    def locate(self, finding: Finding) -> Diagnostic:
        """The finding with its file and line, and with all interpolated values redacted."""
        text, path = (_printable(each, self.interpolator) for each in (finding.text, path_text(finding.path)))
        return Diagnostic(self.name, self.line(finding.path), text, path)

    def walk(self) -> Iterator[tuple[KeyPath, Node]]:
        """Every value of the file with its key path, mappings and lists before their content."""
        return self.root.walk()

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


def read_document(source: bytes, name: str, interpolator: Interpolator) -> Document:
    """Parse a file's bytes. Never raises: what is wrong is in the document's `mistakes`.

    `name` is the file name in the diagnostics.
    """
    builder = _Builder(interpolator)
    root = Node(1, None)
    try:
        root = builder.build(_parse(_decode(source)))
    except _Unreadable as unreadable:
        builder.add_mistake(unreadable.line, str(unreadable))
    mistakes, warnings = (
        tuple(Diagnostic(name, line, _printable(text, interpolator)) for line, text in found)
        for found in (builder.mistakes, builder.warnings)
    )
    data = root.plain()
    return Document(name, root, data if isinstance(data, dict) else None, mistakes, warnings, interpolator)


def _printable(text: str, interpolator: Interpolator) -> str:
    """The text on one line, of bounded length, with interpolated values redacted."""
    text = "".join(letter if letter.isprintable() else "?" for letter in interpolator.redact(text))
    return text if len(text) <= _TEXT_MAX else f"{text[:_TEXT_MAX]}…"


class _Unreadable(Exception):
    """The rest of the file can't be read, from this line on."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


def _decode(source: bytes) -> str:
    if len(source) > BYTES_MAX:
        raise _Unreadable(1, f"the file is larger than {BYTES_MAX // 1_000_000} MB; make it smaller")
    try:
        text = source.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = source.count(b"\n", 0, error.start) + 1
        raise _Unreadable(line, "this is not UTF-8; save the file as UTF-8") from None
    # The parser would raise a ReaderError, which has no line.
    if match := yaml.reader.Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, match.start()) + 1
        raise _Unreadable(line, f"this line has a control character (U+{ord(match[0]):04X}); remove it")
    if match := _TAB_INDENT.search(text):
        line = text.count("\n", 0, match.start()) + 1
        raise _Unreadable(line, "this line is indented with a tab; use spaces")
    return text


def _parse(text: str) -> Iterable[yaml.Event]:
    try:
        yield from yaml.parse(text, Loader=_PARSER)
    except yaml.MarkedYAMLError as error:
        line = _line_number(error.problem_mark)
        raise _Unreadable(line, _explain_syntax_error(error.problem, text.splitlines()[:line])) from None


def _line_number(mark: object) -> int:
    return int(getattr(mark, "line", 0)) + 1  # marks count from 0


def _explain_syntax_error(problem: str | None, lines: list[str]) -> str:
    """The parser's reason, and the remedy for the likeliest cause. The last line is the one with the problem."""
    text, line = "\n".join(lines), lines[-1] if lines else ""
    if _TOML.fullmatch(_first_line(lines)):
        return _NOT_YAML
    if "\t" in line:
        return f"this is not YAML ({problem}); replace the tab with spaces"
    if _has_bare_reference(text, from_line=len(lines)):
        # [${KEY}] fails because { begins a mapping inside of brackets; ["${KEY}"] works.
        return f"this is not YAML ({problem}); inside [ ] and {{ }}, put ${{…}} in quotes"
    if _BARE_PATTERN.search(line):
        return f"this is not YAML ({problem}); put a pattern that begins with * in quotes"
    return f"this is not YAML ({problem}); check the indentation, and quote text that contains : # or brackets"


def _first_line(lines: list[str]) -> str:
    """The first line that is neither blank nor a comment."""
    stripped = map(str.strip, lines)
    return next((line for line in stripped if line and not line.startswith("#")), "")


def _has_bare_reference(text: str, *, from_line: int) -> bool:
    """Whether a `${` without quotes stands inside of [ ] or { }, on a line from this one on (counted from 1)."""
    depth, closing, line, before = 0, "", 1, "\n"
    for index, letter in enumerate(text):
        line += letter == "\n"
        if closing:
            closing = "" if letter == closing else closing
        elif letter == "#" and before.isspace():
            closing = "\n"
        elif letter in "'\"" and (before.isspace() or before in "[{,:"):
            closing = letter
        elif depth and line >= from_line and text.startswith("${", index):
            return True
        else:
            depth += (letter in "[{") - (letter in "]}")
        before = letter
    return False


@dataclass(slots=True)
class _OpenCollection:
    """A mapping or list whose end event has not arrived yet."""

    node: Node
    anchor: str | None
    awaits_key: bool
    key: str | None = None
    key_line: int = 0


class _Builder:
    """Builds nodes from the parser's events.

    The open mappings and lists are on an explicit stack, so a file with deep nesting can't exhaust Python's own.
    """

    def __init__(self, interpolator: Interpolator) -> None:
        self._interpolator = interpolator
        self.mistakes: list[tuple[int, str]] = []
        self.warnings: list[tuple[int, str]] = []
        self._stack: list[_OpenCollection] = []
        self._anchors: dict[str, Node] = {}
        self._root: Node | None = None

    def add_mistake(self, line: int, text: str) -> None:
        self.mistakes.append((line, text))

    def build(self, events: Iterable[yaml.Event]) -> Node:
        """The top-level mapping. Raises _Unreadable if there is none."""
        for event in events:
            self._handle(event)
        if self._root is None or self._root.value is None:
            raise _Unreadable(1, "the file is empty; write at least upstreams, groups and users")
        if not isinstance(self._root.value, dict):
            raise _Unreadable(self._root.line, _explain_root(self._root.value))
        return self._root

    def _handle(self, event: yaml.Event) -> None:
        line = _line_number(event.start_mark)
        match event:
            case yaml.ScalarEvent():
                self._attach(self._scalar(event, line), event.anchor)
            case yaml.AliasEvent():
                self._attach(self._resolve_alias(event.anchor, line), None, line)
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                self._open(event, line)
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                closed = self._stack.pop()
                self._attach(closed.node, closed.anchor)
            case yaml.DocumentStartEvent() if self._root is not None:
                raise _Unreadable(line, "a second YAML document begins here; keep one document and remove the ---")

    def _open(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent, line: int) -> None:
        if len(self._stack) >= DEPTH_MAX - 1:
            raise _Unreadable(line, f"this is nested deeper than {DEPTH_MAX} levels; flatten it")
        is_mapping = isinstance(event, yaml.MappingStartEvent)
        node = Node(line, {} if is_mapping else [])
        if event.tag is not None:
            node.is_bad = True
            self.add_mistake(line, _TAG_MISTAKE)
        self._stack.append(_OpenCollection(node, event.anchor, is_mapping))

    def _resolve_alias(self, anchor: str | None, line: int) -> Node:
        # An anchor is stored when its value is complete, so a value can't contain itself (&a [*a]).
        node = self._anchors.get(anchor or "")
        if node is None:
            raise _Unreadable(
                line,
                f"the alias *{anchor} is used before its anchor &{anchor} is complete; define &{anchor} first, or "
                f'put "*{anchor}" in quotes if it is a pattern',
            )
        return node

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> Node:
        text, is_plain = event.value, event.implicit[0]  # plain: without quotes
        is_key = bool(self._stack) and self._stack[-1].awaits_key
        mistake = _TAG_MISTAKE if event.tag is not None else _yaml_1_1_mistake(text) if is_plain else None
        if mistake:
            self.add_mistake(line, mistake)
            return Node(line, text, is_bad=True)
        # Keys are not interpolated: a name in the file is the name in force.
        if "${" in text and not is_key:
            return self._interpolate(text, line)
        return Node(line, _plain_scalar(text) if is_plain else text)

    def _interpolate(self, text: str, line: int) -> Node:
        result = self._interpolator.interpolate(text)
        for mistake in result.mistakes:
            self.add_mistake(line, mistake)
        self.warnings += [(line, warning) for warning in result.warnings]
        return Node(line, result.text, is_bad=bool(result.mistakes), is_interpolated=result.is_interpolated)

    def _attach(self, node: Node, anchor: str | None, line: int | None = None) -> None:
        """Add a complete node to the innermost open mapping or list. For an alias, `line` is the alias's own line."""
        line = line or node.line
        if anchor:
            self._anchors[anchor] = node
        if not self._stack:
            self._root = node
            return
        top = self._stack[-1]
        top.node.size += node.size
        top.node.height = max(top.node.height, node.height + 1)
        # An alias bomb: with ten aliases to the previous line on each line, line 6 stands for a million values.
        # Sizes are sums of sizes, so it is rejected without expanding it.
        if top.node.size > NODES_MAX:
            raise _Unreadable(
                line, f"there are more than {NODES_MAX:,} values, each alias counted in full; use fewer"
            )
        # The same for depth: a1: &a1 [*a0], a2: &a2 [*a1], … nests one level deeper on every line.
        if len(self._stack) + node.height > DEPTH_MAX:
            raise _Unreadable(line, f"aliases nest this deeper than {DEPTH_MAX} levels; flatten it")
        if isinstance(top.node.value, list):
            top.node.value.append(node)
        elif top.awaits_key:
            top.key, top.key_line, top.awaits_key = self._key(node, top.node, line), line, False
        else:
            self._set_value(top, node)

    def _key(self, node: Node, mapping: Node, line: int) -> str | None:
        """The text of a key. None for an invalid or duplicate key, whose value is then discarded."""
        if isinstance(node.value, bool) or not isinstance(node.value, str | int) or node.value == "":
            self.add_mistake(line, 'this key is not a name; write a word, and quote words such as "null" or "true"')
            return None
        if node.value == "<<" and node.is_bad:
            mapping.is_bad = True  # what it lacks is probably in the other mapping
            return None
        key = str(node.value)  # a user called 1001 may be listed without quotes
        if key in mapping.key_lines:
            self.add_mistake(line, f'"{key}" is already on line {mapping.key_lines[key]}; merge the two')
            return None
        return key

    @staticmethod
    def _set_value(top: _OpenCollection, node: Node) -> None:
        assert isinstance(top.node.value, dict)
        if top.key is not None:
            top.node.value[top.key] = node
            top.node.key_lines[top.key] = top.key_line
        top.awaits_key = True


def _explain_root(value: "Scalar | list[Node]") -> str:
    if isinstance(value, str) and _TOML.fullmatch(value):
        return _NOT_YAML
    if isinstance(value, str) and _MARKUP.match(value):
        return "this is a page or XML, and not YAML; give the path of the file with the policy"
    return 'the file must be a mapping; start lines such as "groups:" at the left margin'


def _yaml_1_1_mistake(text: str) -> str | None:
    """What to write instead of a plain scalar that YAML 1.1 does not read as it looks. None for all others."""
    if _BOOLEAN_WORDS.fullmatch(text):
        return (
            f'some YAML parsers read "{text}" as true or false; '
            f'write true or false, or put "{text}" in quotes to keep the word'
        )
    if _BASE_60.fullmatch(text):
        return f'some YAML parsers read "{text}" as a base-60 number; put it in quotes'
    if _NOT_DECIMAL.fullmatch(text):
        return (
            f'some YAML parsers do not read "{text}" as a decimal number; '
            "write it in decimal without a 0 in front, or put it in quotes"
        )
    if text == "<<":
        return "merge keys (<<) are not supported; write the keys out"
    return None


def _plain_scalar(text: str) -> Scalar:
    """The value of a scalar without quotes: null, a boolean, an integer, or the text as written."""
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    return int(text) if _INTEGER.fullmatch(text) else text


def to_yaml(value: object) -> str:
    """A value as YAML, as a person would write it. Texts that could be read as something else are in quotes."""
    text: str = yaml.dump_all(
        [value], Dumper=_WRITER, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )
    return text
