"""How vendors reject a maximum that is too large: their recorded messages, with the numbers of a request put in."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INPUT = 8
_SENT = 3492


@dataclass(frozen=True)
class Rejection:
    """The answer to a request with the maximum `sent` and INPUT tokens of input. It would accept `allowed`."""

    vendor: str
    status: int
    sent: int
    allowed: int
    text: str

    def body(self, sent: int) -> bytes:
        """The body for another maximum."""
        numbers = {"<total>": INPUT + sent, "<input>": INPUT, "<sent>": sent}
        text = self.text
        for name, number in numbers.items():
            text = text.replace(name, str(number))
        return text.encode()


def _rejection(row: dict[str, Any]) -> Rejection:
    error = {"message": row.get("message"), "type": "invalid_request_error", "param": None, "code": None}
    body = row.get("body", {"error": error})
    return Rejection(row["vendor"], row["status"], row.get("sent", _SENT), row["allowed"], json.dumps(body))


REJECTIONS = [
    _rejection(row) for row in json.loads((Path(__file__).parent / "recorded/maximum-rejections.json").read_bytes())
]
