"""The parsed body of a request, and the one walk over its messages and items.

Both APIs send conversations: chat and /messages in `messages`, /responses in `input`. Most turns are a role and a
text, and nothing else. They are separated from all others once, here, so that neither the refusals (`restrictions`)
nor the reading of the prompt (`content`) look at them again. Pure.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Fields whose values are messages or items, and on some endpoints texts or lists of token numbers.
_TURN_FIELDS = ("messages", "input")
# Tools that the client runs. None: some servers do not require a type.
_CLIENT_TOOL_TYPES = ("function", "custom", None)


@dataclass(frozen=True, slots=True)
class Turns:
    """A list of messages or items, after one walk over it.

    Most turns of a conversation are plain: a role and a text, and nothing else. They refer to nothing, nest nothing
    and cost the same tokens around their texts, so only the others are looked at again.

    `reading` has the texts of plain turns and every other turn as it is, in the order of the list. `unusual` are
    these other turns, `plain` is the number of plain ones. The role of a plain turn comes before its text, in
    whatever order the client wrote them, which makes no difference to the number of tokens:

        [{"role": "user", "content": "Hi"}, {"role": "user", "content": [{…}]}]
        → reading ["user", "Hi", {…}], unusual [{…}], plain 1
    """

    reading: list[object]
    unusual: list[object]
    plain: int


class RequestBody:
    """The parsed body of one request. It is freed as soon as the upstream has answered.

    Agents send megabytes, and an answer may stream for minutes: the body must not stay in memory for that long.
    Everything that is needed afterwards is a field of `Request`. `cost` says how much work it is to read
    (`strict_json.reading_cost`); 0 for a form, which has only a few fields.
    """

    __slots__ = ("_document", "_on_freed", "_turns", "cost")

    def __init__(self, document: Mapping[str, Any], *, cost: int = 0) -> None:
        self.cost = cost
        self._document: Mapping[str, Any] | None = document
        self._turns: dict[str, Turns] | None = None
        self._on_freed: Callable[[], object] | None = None

    @property
    def document(self) -> Mapping[str, Any]:
        """The JSON object, or the fields of a form by name. Must not be read after `free`."""
        assert self._document is not None, "the body was freed when the upstream answered"
        return self._document

    @property
    def turns(self) -> Mapping[str, Turns]:
        """The turns of `messages` and of `input`, for those of the two that are lists. They are walked over once."""
        if self._turns is None:
            lists = ((name, self.document.get(name)) for name in _TURN_FIELDS)
            self._turns = {name: _walk_turns(value) for name, value in lists if isinstance(value, list)}
        return self._turns

    def when_freed(self, notify: Callable[[], object]) -> None:
        """Call `notify` when the body is freed for the first time."""
        self._on_freed = notify

    def free(self) -> None:
        """Drop the parsed body."""
        self._document = self._turns = None
        notify, self._on_freed = self._on_freed, None
        if notify is not None:
            notify()


def _walk_turns(turns: list[Any]) -> Turns:
    reading: list[object] = []
    unusual: list[object] = []
    append, plain = reading.append, 0
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
        elif type(turn) is str:
            if turn:
                append(turn)
        else:
            append(turn)
            unusual.append(turn)
    return Turns(reading, unusual, plain)


def content_parts(body: RequestBody) -> list[dict[str, Any]]:
    """All messages and items that are not plain, all parts of their contents and outputs, and all parts within these.

    At any depth, and also if a part or a message is not inside a list.
    """
    turns, document = body.turns, body.document
    found = [turns[name].unusual if name in turns else [document.get(name)] for name in _TURN_FIELDS]
    parts = [turn for field in found for turn in field if isinstance(turn, dict)]
    for part in parts:  # the list grows while it is read, so parts within parts are found without recursion
        for content in (part.get("content"), part.get("output"), _get(part.get("source"), "content")):
            if isinstance(content, list):
                parts += [inner for inner in content if isinstance(inner, dict)]
            elif isinstance(content, dict):
                parts.append(content)
    return parts


def offered_tools(body: RequestBody) -> list[Any]:
    """The tools that a request offers to the model: in `tools`, in items (`additional_tools`), and in groups."""
    tools = _list_or_empty(body.document.get("tools"))[:]
    items = body.turns.get("input")
    for item in items.unusual if items is not None else ():
        # `mcp_list_tools` only repeats what an MCP server once listed.
        tools += _list_or_empty(_get(item, "tools")) if _get(item, "type") != "mcp_list_tools" else ()
    for tool in tools:  # the list grows while it is read, so groups within groups are found without recursion
        tools += _list_or_empty(_get(tool, "tools"))
    return tools


def is_run_by_client(tool: object) -> bool:
    """Whether the client runs this tool, so that the request shows everything that the model reads of it.

    A `tool_search` with `execution: client` is one; without, the upstream searches and reads what it finds. A
    `namespace` only groups other tools, each of which is checked by itself (`offered_tools`).
    """
    kind = _get(tool, "type")
    is_search = kind == "tool_search" and _get(tool, "execution") == "client"
    is_group = kind == "namespace" and isinstance(_get(tool, "tools"), list)
    return isinstance(tool, dict) and (kind in _CLIENT_TOOL_TYPES or is_search or is_group)


def _get(value: object, name: str) -> object:
    """The member of an object; None for any other value."""
    return value.get(name) if isinstance(value, dict) else None


def _list_or_empty(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
