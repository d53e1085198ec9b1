"""The simulator keeps what it may keep, and says of it what the real one would, to whoever asks."""

import pytest

from proxy.simulator.directives import Complaint, read_directions
from proxy.simulator.store import Memory
from proxy.simulator.text import Author, Endpoint, Script


def script(endpoint: Endpoint = Endpoint.RESPONSES, **more: object) -> Script:
    """What is said to a call."""
    asked = {"model": "m", "input": "three small words", "metadata": {"simulate": "tokens=4"}, **more}
    return Author(0).script(endpoint, asked, read_directions(asked))


def test_a_response_is_read_as_it_was_given() -> None:
    """Whole, as its stream from any event on, and what it was asked."""
    memory, said = Memory(), script()
    memory.keep(said, id="resp_1", created=7)
    response = memory.response("resp_1")
    assert (response["id"], response["created_at"], response["usage"]["total_tokens"]) == ("resp_1", 7, 7)
    whole = memory.events("resp_1", after=-1)
    assert whole.startswith(b"event: response.created")
    assert whole.endswith(memory.events("resp_1", after=2))
    assert b"response.completed" in memory.events("resp_1", after=2)
    assert memory.items("resp_1")["data"][0]["content"][0]["text"] == "three small words"


def test_who_goes_on_from_a_response_reads_it_once_more() -> None:
    """Its input is in the usage of the next."""
    memory = Memory()
    memory.keep(script(), id="resp_1", created=7)
    assert memory.going_on(script(previous_response_id="resp_1")).input_tokens == 3 + 4 + 3
    assert memory.going_on(script()).input_tokens == 3
    chat = script(Endpoint.CHAT, previous_response_id="resp_2", messages=[{"role": "user", "content": "Hi"}])
    assert memory.going_on(chat) is chat
    with pytest.raises(Complaint, match="not found"):
        memory.going_on(script(previous_response_id="resp_2"))


def test_nothing_is_kept_that_may_not_be() -> None:
    """Nor what is no response, nor one that was deleted, nor all of them for ever."""
    memory = Memory()
    memory.keep(script(store=False), id="resp_1", created=7)
    memory.keep(script(Endpoint.CHAT, messages=[{"role": "user", "content": "Hi"}]), id="chatcmpl-1", created=7)
    memory.keep(said := script(), id="resp_2", created=7)
    with pytest.raises(Complaint, match="Only a background"):
        memory.cancel("resp_2")
    assert memory.forget("resp_2")["deleted"] is True
    for act in (memory.response, memory.items, memory.cancel, memory.forget):
        for name in ("resp_1", "resp_2", "chatcmpl-1"):
            with pytest.raises(Complaint, match=f"Response with id '{name}' not found"):
                act(name)
    for number in range(1001):
        memory.keep(said, id=f"resp_{number}", created=7)
    with pytest.raises(Complaint, match="resp_0"):
        memory.events("resp_0", after=-1)
    assert memory.response("resp_1")["id"] == "resp_1"
