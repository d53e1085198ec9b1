"""The parsed body of a request, and the one walk over its messages and items.

Both APIs send conversations: chat and /messages in `messages`, /responses in `input`. Most turns are a role and a
text, and nothing else. They are separated from all others once, here, so that neither the refusals (`restrictions`)
nor the reading of the prompt (`content`) look at them again. Servers accept other shapes than the documented ones,
so what is found here does not depend on whether a value is in a list. Pure.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from proxy.formats.strict_json import DEPTH_MAX, INTEGERS_MAX

# Fields whose values are messages or items, and on some endpoints texts or lists of token numbers.
_TURN_FIELDS = ("messages", "input")
# Other fields in which content may be: texts, parts, and images.
CONTENT_FIELDS = frozenset(
    "system instructions prompt image images mask attachments documents file files image_url reference_images".split()
)
# Members of turns and parts below which nothing is content: see `content_objects`.
_NO_CONTENT = frozenset(
    "arguments input parameters input_schema tools annotations citations results outputs action logprobs".split()
)
# How DashScope's `qwen-long` names stored files: in the text of a system message.
FILE_ID_TEXT = "fileid://"
_SYSTEM_ROLES = ("system", "developer")
_ROLE_MAX = max(map(len, _SYSTEM_ROLES))
# Members of which each tool has at least one.
_TOOL_MEMBERS = frozenset(("type", "name", "function"))
# Values below which there may be others, and those that may be rounded integers.
_NESTED_OR_FLOAT = frozenset((dict, list, float))
# Tools that the client runs. None: some servers do not require a type.
_CLIENT_TOOL_TYPES = ("function", "custom", None)


class Turns(NamedTuple):
    """A list of messages or items, after one walk over it.

    Most turns of a conversation are plain: a role and a text, and nothing else. They refer to nothing, nest nothing
    and cost the same tokens around their texts, so only the others are looked at again.

    `reading` has the texts of plain turns and every other turn as it is, in the order of the list. `unusual` are
    these other turns, `plain` is the number of plain ones. The role of a plain turn comes before its text, in
    whatever order the client wrote them, which makes no difference to the number of tokens. `names_files` says that a
    plain system message has FILE_ID_TEXT in it:

        [{"role": "user", "content": "Hi"}, {"role": "user", "content": [{…}]}]
        → reading ["user", "Hi", {…}], unusual [{…}], plain 1, names_files False
    """

    reading: list[object]
    unusual: list[object]
    plain: int
    names_files: bool


class RequestBody:
    """The parsed body of one request. It is freed as soon as the upstream has answered.

    Agents send megabytes, and an answer may stream for minutes: the body must not stay in memory for that long.
    Everything that is needed afterwards is a field of `Request`. None of these attributes may be read then:

    - `document`: the JSON object, or the fields of a form by name.
    - `turns`: those of `messages` and of `input`, for those of the two that are lists.
    - `unusual`: all messages and items that are not plain: in a list, in a list within it, or alone.
    - `tools`: what the request offers to the model, see `_offered_tools`.
    - `is_too_deep`: it is nested more than DEPTH_MAX levels deep.
    - `has_large_floats`: one of its floats may have been an integer beyond 64 bits, see `strict_json.parse_object`.

    `cost` says how much work it is to read (`strict_json.reading_cost`); 0 for a form, which has only a few fields.
    """

    __slots__ = ("_on_freed", "cost", "document", "has_large_floats", "is_too_deep", "tools", "turns", "unusual")

    def __init__(self, document: Mapping[str, Any], *, cost: int = 0) -> None:
        self.cost = cost
        self.document = document
        self.turns: dict[str, Turns] = {}
        self.unusual: list[dict[str, Any]] = []
        self.tools: list[Any] = []
        self._on_freed: Callable[[], object] | None = None
        self.is_too_deep = self.has_large_floats = False
        # The body is level 1. A list of turns is level 2, and its turns are level 3.
        level: list[Any] = []
        for name, value in document.items():
            if name in _TURN_FIELDS and type(value) is list:
                turns = self.turns[name] = _walk_turns(value)
                if turns.unusual:
                    level.append(turns.unusual)
            elif type(value) in _NESTED_OR_FLOAT:
                level.append(value)
        if level:
            self._survey(level)
            self.unusual = unusual_turns(self, _TURN_FIELDS)
        if level or "tools" in document:
            self.tools = _offered_tools(document, self.unusual)

    def _survey(self, level: list[Any]) -> None:
        """Look at all values except those of plain turns, level by level, so that no depth overflows the stack."""
        for _ in range(DEPTH_MAX - 1):
            nested = [value for value in level if type(value) is not float]
            if len(nested) < len(level):
                self.has_large_floats |= any(type(each) is float and abs(each) >= INTEGERS_MAX for each in level)
            level = [
                child
                for value in nested
                for child in (value.values() if type(value) is dict else value)
                if type(child) in _NESTED_OR_FLOAT
            ]
            if not level:
                return
        self.is_too_deep = any(type(value) is not float for value in level)

    def when_freed(self, notify: Callable[[], object]) -> None:
        """Call `notify` when the body is freed for the first time."""
        self._on_freed = notify

    def free(self) -> None:
        """Drop the parsed body."""
        if hasattr(self, "document"):
            del self.document, self.turns, self.unusual, self.tools
        notify, self._on_freed = self._on_freed, None
        if notify is not None:
            notify()


def _walk_turns(turns: list[Any]) -> Turns:
    reading: list[object] = []
    unusual: list[object] = []
    append, plain, names_files = reading.append, 0, False
    # Written for speed, because conversations have hundreds of turns: types of JSON values have no subclasses, so
    # `type` does for `isinstance`, and `get` takes half the time of unpacking `values()`.
    for turn in turns:
        if (
            type(turn) is dict
            and len(turn) == 2
            and type(text := turn.get("content")) is str
            and type(role := turn.get("role")) is str
            and text
            and role
        ):
            append(role)
            append(text)
            plain += 1
            if role != "user" and role != "assistant" and FILE_ID_TEXT in text and is_system_role(role):
                names_files = True
        elif type(turn) is str:
            if turn:
                append(turn)
        else:
            append(turn)
            unusual.append(turn)
    return Turns(reading, unusual, plain, names_files)


def is_system_role(role: object) -> bool:
    """Whether this is the role of a system message."""
    return isinstance(role, str) and len(role) <= _ROLE_MAX and role.casefold() in _SYSTEM_ROLES


def content_objects(body: RequestBody) -> list[dict[str, Any]]:
    """Every object in which a server could look for content: turns that are not plain, their parts, and all below.

    The shape does not matter: parts are found in a list, alone, in a list within a list, and below members of any
    name and spelling. Left out are members with names of the user's own, such as the arguments of a function, and
    those that only repeat what the upstream once said, such as citations.
    """
    found: list[dict[str, Any]] = body.unusual[:]
    lists: list[list[Any]] = [[value for name, value in body.document.items() if name in CONTENT_FIELDS]]
    read = 0
    while lists or read < len(found):  # not recursive, so no depth overflows the stack
        while lists:
            for inner in lists.pop():
                if type(inner) is dict:
                    found.append(inner)
                elif type(inner) is list:
                    lists.append(inner)
        for part in found[read:]:
            for name, inner in part.items():
                if type(inner) is dict and name not in _NO_CONTENT:
                    found.append(inner)
                elif type(inner) is list and name not in _NO_CONTENT:
                    lists.append(inner)
            read += 1
    return found


def unusual_turns(body: RequestBody, names: Iterable[str]) -> list[dict[str, Any]]:
    """The messages and items of these fields that are not plain: in a list, in a list within it, or alone."""
    turns, document = body.turns, body.document
    found: list[dict[str, Any]] = []
    pending: list[object] = []
    for name in names:
        pending += turns[name].unusual if name in turns else [document.get(name)]
    for turn in pending:  # the list grows while it is read
        if type(turn) is dict:
            found.append(turn)
        elif type(turn) is list:
            pending += [inner for inner in turn if type(inner) is dict or type(inner) is list]
    return found


def _offered_tools(document: Mapping[str, Any], turns: Iterable[dict[str, Any]]) -> list[Any]:
    """The tools that a request offers to the model: in `tools`, in items and messages, and in groups.

    A tool that is not in a list is one too.
    """
    tools = _tools_in(document.get("tools"))
    for turn in turns:
        # `mcp_list_tools` only repeats what an MCP server once listed.
        if "tools" in turn and turn.get("type") != "mcp_list_tools":
            tools += _tools_in(turn["tools"])
    for tool in tools:  # the list grows while it is read, so groups within groups are found without recursion
        if type(tool) is dict and "tools" in tool:
            tools += _tools_in(tool["tools"])
    return tools


def is_run_by_client(tool: object) -> bool:
    """Whether the client runs this tool, so that the request shows everything that the model reads of it.

    A `tool_search` with `execution: client` is one; without, the upstream searches and reads what it finds. A
    `namespace` only groups other tools, each of which is checked by itself (`offered_tools`).
    """
    kind = _get(tool, "type")
    is_search = kind == "tool_search" and _get(tool, "execution") == "client"
    is_group = kind == "namespace" and isinstance(_get(tool, "tools"), list | dict)
    return isinstance(tool, dict) and (kind in _CLIENT_TOOL_TYPES or is_search or is_group)


def _get(value: object, name: str) -> object:
    """The member of an object; None for any other value."""
    return value.get(name) if isinstance(value, dict) else None


def _tools_in(value: object) -> list[Any]:
    """The tools in a member `tools`: of a list its values, else the value itself.

    An object without a type and a name is also read as a mapping of tools: PHP has one type for lists and objects.
    """
    if isinstance(value, dict) and _TOOL_MEMBERS.isdisjoint(value):
        return [value, *value.values()]
    if isinstance(value, list):
        return value[:]
    return [] if value is None or value is False else [value]
