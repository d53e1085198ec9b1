"""Stored responses can be read, continued and deleted by any request with the key, as at OpenAI."""

import pytest

from proxy.simulator.directives import ApiError, read_directives
from proxy.simulator.store import ResponseStore
from proxy.simulator.text import Answer, Endpoint, Generator


def generated(endpoint: Endpoint = Endpoint.RESPONSES, **more: object) -> Answer:
    """The answer to a call with these parameters."""
    params = {"model": "m", "input": "three small words", "metadata": {"simulate": "tokens=4"}, **more}
    return Generator(0).answer(endpoint, params, read_directives(params))


def test_a_stored_response_can_be_read() -> None:
    """As a whole, as its stream from any event on, and its input."""
    store = ResponseStore()
    store.add(generated(), id="resp_1", created=7)
    response = store.response("resp_1")
    assert (response["id"], response["created_at"], response["usage"]["total_tokens"]) == ("resp_1", 7, 7)
    whole = store.events("resp_1", after=-1)
    assert whole.startswith(b"event: response.created")
    assert whole.endswith(store.events("resp_1", after=2))
    assert b"response.completed" in store.events("resp_1", after=2)
    assert store.input_items("resp_1")["data"][0]["content"][0]["text"] == "three small words"


def test_a_response_that_continues_another_reads_its_tokens_again() -> None:
    """The input and output of the previous response are input of the next."""
    store = ResponseStore()
    store.add(generated(), id="resp_1", created=7)
    assert store.with_previous(generated(previous_response_id="resp_1")).input_tokens == 3 + 4 + 3
    assert store.with_previous(generated()).input_tokens == 3
    chat = generated(Endpoint.CHAT, previous_response_id="resp_2", messages=[{"role": "user", "content": "Hi"}])
    assert store.with_previous(chat) is chat
    with pytest.raises(ApiError, match="not found"):
        store.with_previous(generated(previous_response_id="resp_2"))


def test_some_responses_are_not_stored() -> None:
    """Not one with `"store": false`, another endpoint's answer or a deleted one, and only the latest thousand."""
    store = ResponseStore()
    store.add(generated(store=False), id="resp_1", created=7)
    store.add(generated(Endpoint.CHAT, messages=[{"role": "user", "content": "Hi"}]), id="chatcmpl-1", created=7)
    store.add(answer := generated(), id="resp_2", created=7)
    with pytest.raises(ApiError, match="Only a background"):
        store.cancel("resp_2")
    assert store.delete("resp_2")["deleted"] is True
    for operation in (store.response, store.input_items, store.cancel, store.delete):
        for name in ("resp_1", "resp_2", "chatcmpl-1"):
            with pytest.raises(ApiError, match=f"Response with id '{name}' not found"):
                operation(name)
    for number in range(1001):
        store.add(answer, id=f"resp_{number}", created=7)
    with pytest.raises(ApiError, match="resp_0"):
        store.events("resp_0", after=-1)
    assert store.response("resp_1")["id"] == "resp_1"
