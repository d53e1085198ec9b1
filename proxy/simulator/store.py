"""What the simulator keeps of its responses, and says of them to whoever has its key and an id.

That is what the real one does too: whose a response is, only the proxy knows. Pure.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import orjson

from proxy.simulator.directives import Complaint
from proxy.simulator.frames import write_stream, write_whole
from proxy.simulator.text import Endpoint, Script

_KEPT = 1000


class Memory:
    """The latest responses, by their ids."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Script, int]] = {}

    def keep(self, script: Script, *, id: str, created: int) -> None:
        """Keep what is said to a call, if it is a response that may be kept."""
        if script.endpoint is not Endpoint.RESPONSES or script.asked.get("store") is False:
            return
        self._kept[id] = (script, created)
        if len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]

    def going_on(self, script: Script) -> Script:
        """The script with what came before it, which is read once more. Raises Complaint."""
        id = script.asked.get("previous_response_id")
        if script.endpoint is not Endpoint.RESPONSES or id is None:
            return script
        if id not in self._kept:
            message = f"Previous response with id '{id}' not found."
            raise Complaint(400, message, code="previous_response_not_found", param="previous_response_id")
        before = self._kept[id][0]
        return replace(script, input_tokens=before.input_tokens + before.output_tokens + script.input_tokens)

    def answer(self, method: str, path: str, query: Mapping[str, str]) -> Any:
        """What is answered to a request for one of them: an object, or the bytes of a stream. Raises Complaint."""
        id, _, of_it = path.removeprefix("/v1/responses/").partition("/")
        match method, of_it:
            case "GET", "" if query.get("stream") == "true":
                return self.events(id, after=int(query.get("starting_after", -1)))
            case "GET", "":
                return self.response(id)
            case "GET", "input_items":
                return self.items(id)
            case "POST", "cancel":
                return self.cancel(id)
            case "DELETE", "":
                return self.forget(id)
        raise Complaint(404, f"Invalid URL ({method} {path})")

    def response(self, id: str) -> Any:
        """A response as a whole. Raises Complaint."""
        script, created = self._find(id)
        return orjson.loads(write_whole(script, id=id, created=created))

    def events(self, id: str, *, after: int) -> bytes:
        """Its stream once more, from behind the event of this number on. Raises Complaint."""
        script, created = self._find(id)
        stream = write_stream(script, id=id, created=created)
        return b"".join([*chain(stream.opening, stream.text, stream.closing)][after + 1 :])

    def items(self, id: str) -> Any:
        """What it was asked. Raises Complaint."""
        asked = self._find(id)[0].asked.get("input")
        content = [{"type": "input_text", "text": asked if isinstance(asked, str) else orjson.dumps(asked).decode()}]
        item = {"id": f"msg_in_{id}", "type": "message", "status": "completed", "role": "user", "content": content}
        return {"object": "list", "data": [item], "first_id": item["id"], "last_id": item["id"], "has_more": False}

    def cancel(self, id: str) -> Any:
        """Complain: it has been answered already."""
        self._find(id)
        raise Complaint(400, "Only a background response can be cancelled.")

    def forget(self, id: str) -> Any:
        """Delete it. Raises Complaint."""
        self._find(id)
        del self._kept[id]
        return {"id": id, "object": "response", "deleted": True}

    def _find(self, id: str) -> tuple[Script, int]:
        if id not in self._kept:
            raise Complaint(404, f"Response with id '{id}' not found.")
        return self._kept[id]
