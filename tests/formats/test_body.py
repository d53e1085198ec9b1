"""One walk over a conversation tells plain turns from all others, and finds every part of these.

Threat T34 (20,000 of everything).
"""

import pytest

from proxy.formats.body import RequestBody, content_parts
from proxy.formats.content import read_prompt


def test_turns_are_walked_over_once():
    """What is plain is told from what is not, and the order of the texts is kept."""
    odd = {"role": "user", "content": [{"type": "text", "text": "c"}]}
    body = RequestBody({"messages": [{"role": "user", "content": "a"}, odd, "b", "", {"role": "", "content": "x"}]})
    turns = body.turns["messages"]
    assert turns.reading == ["user", "a", odd, "b", {"role": "", "content": "x"}]
    assert (turns.unusual, turns.plain) == ([odd, {"role": "", "content": "x"}], 1)
    assert body.turns["messages"] is turns
    assert "input" not in body.turns
    assert read_prompt(body, is_chat=True).texts == ("user", "a", "user", "c", "b", "x")


@pytest.mark.parametrize("field", ["messages", "input"])
def test_the_parts_of_a_request_are_its_messages_and_their_parts(field: str):
    """Parts of contents and of tool outputs, in a list or alone; a text is not a part."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    alone = {"type": "f"}
    turns = [{"content": parts[:1]}, {"output": [*parts[1:], "c"]}, {"content": "d"}, "e", {"output": alone}]
    assert content_parts(RequestBody({field: turns})) == [*[turn for turn in turns if turn != "e"], *parts, alone]
    assert content_parts(RequestBody({field: alone})) == [alone]
    assert content_parts(RequestBody({field: "x"})) == []


def test_parts_within_parts_are_found():
    """In the output of a tool, and in a document that is made of parts."""
    text = {"type": "text", "text": "a"}
    document = {"type": "document", "source": {"type": "content", "content": [text, "x"]}}
    result = {"type": "tool_result", "content": [document, "x"]}
    turn = {"role": "user", "content": [result]}
    assert content_parts(RequestBody({"messages": [turn]})) == [turn, result, document, text]
