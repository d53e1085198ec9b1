"""Stored responses: the simulator keeps the answers of /v1/responses; a client can read, continue or delete them.

As at OpenAI, any request with the API key can read any response by its id. Which user of the proxy a response belongs
to, only the proxy knows.

Pure: `server` does the HTTP.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import orjson

from proxy.simulator.directives import ApiError
from proxy.simulator.frames import write_stream, write_whole
from proxy.simulator.text import Answer, Endpoint

_RESPONSES_MAX = 1000


class ResponseStore:
    """The latest responses, by id; the oldest is dropped if there are too many."""

    def __init__(self) -> None:
        self._responses: dict[str, tuple[Answer, int]] = {}

    def add(self, answer: Answer, *, id: str, created: int) -> None:
        """Store an answer if it is a response and the request does not say `"store": false`."""
        if answer.endpoint is not Endpoint.RESPONSES or answer.params.get("store") is False:
            return
        self._responses[id] = (answer, created)
        if len(self._responses) > _RESPONSES_MAX:
            del self._responses[next(iter(self._responses))]

    def with_previous(self, answer: Answer) -> Answer:
        """Add the tokens of the `previous_response_id` to the answer's input, because the model reads them again.

        A response with 3 input and 4 output tokens, continued with 3 words, has 10 input tokens. Raises ApiError if
        the id is unknown.
        """
        id = answer.params.get("previous_response_id")
        if answer.endpoint is not Endpoint.RESPONSES or id is None:
            return answer
        if id not in self._responses:
            message = f"Previous response with id '{id}' not found."
            raise ApiError(400, message, code="previous_response_not_found", param="previous_response_id")
        previous = self._responses[id][0]
        return replace(answer, input_tokens=previous.input_tokens + previous.output_tokens + answer.input_tokens)

    def handle(self, method: str, path: str, query: Mapping[str, str]) -> Any:
        """Answer a request for a stored response with a JSON object or the bytes of a stream. Raises ApiError."""
        id, _, action = path.removeprefix("/v1/responses/").partition("/")
        match method, action:
            case "GET", "" if query.get("stream") == "true":
                return self.events(id, after=int(query.get("starting_after", -1)))
            case "GET", "":
                return self.response(id)
            case "GET", "input_items":
                return self.input_items(id)
            case "POST", "cancel":
                return self.cancel(id)
            case "DELETE", "":
                return self.delete(id)
        raise ApiError(404, f"Invalid URL ({method} {path})")

    def response(self, id: str) -> Any:
        """Return a response as a JSON object. Raises ApiError."""
        answer, created = self._find(id)
        return orjson.loads(write_whole(answer, id=id, created=created))

    def events(self, id: str, *, after: int) -> bytes:
        """Return the events of its stream that follow the event with this sequence number. Raises ApiError."""
        answer, created = self._find(id)
        stream = write_stream(answer, id=id, created=created)
        return b"".join([*chain(stream.opening, stream.text, stream.closing)][after + 1 :])

    def input_items(self, id: str) -> Any:
        """Return the input of the request. Raises ApiError."""
        given = self._find(id)[0].params.get("input")
        content = [{"type": "input_text", "text": given if isinstance(given, str) else orjson.dumps(given).decode()}]
        item = {"id": f"msg_in_{id}", "type": "message", "status": "completed", "role": "user", "content": content}
        return {"object": "list", "data": [item], "first_id": item["id"], "last_id": item["id"], "has_more": False}

    def cancel(self, id: str) -> Any:
        """Raise ApiError: only a background response can be cancelled, and the simulator has none."""
        self._find(id)
        raise ApiError(400, "Only a background response can be cancelled.")

    def delete(self, id: str) -> Any:
        """Delete a response. Raises ApiError."""
        self._find(id)
        del self._responses[id]
        return {"id": id, "object": "response", "deleted": True}

    def _find(self, id: str) -> tuple[Answer, int]:
        if id not in self._responses:
            raise ApiError(404, f"Response with id '{id}' not found.")
        return self._responses[id]
