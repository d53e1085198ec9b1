"""What a request asks for, and where it ends, must be plain (RFC 9112 §11.2): one that others in front of us could
read otherwise is refused, and its connection closed, so that nothing behind it is taken for a request.

The server library refuses most of it while it reads (two lengths, a length and a transfer coding, lines that are no
HTTP). Here is what it takes all the same.
"""

import re

from aiohttp import hdrs, web

from proxy.errors import BadFraming
from proxy.web.middleware import Handler

# RFC 9110 §7.2: a name or an address and perhaps a port; a slash in it could be taken for the beginning of a path.
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~-]*)(?::[0-9]{0,5})?")


@web.middleware
async def validate_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Handle the request if it can be read in one way only; raises BadFraming."""
    # The target is a path of ours: no other server's URL, and no fragment, which the library would drop.
    if not request.raw_path.startswith("/") and request.raw_path != "*":
        raise BadFraming("Send the path alone in the request line: this is no forward proxy.")
    if "#" in request.raw_path:
        raise BadFraming("The path holds a fragment (#…), which is not for servers.")
    if request.version not in ((1, 0), (1, 1)):
        raise BadFraming("Speak HTTP/1.1 or HTTP/1.0.")
    if not _HOST.fullmatch(request.headers.get(hdrs.HOST, "")):
        raise BadFraming("The Host header names no host.")
    codings = request.headers.getall(hdrs.TRANSFER_ENCODING, [])
    if codings and ([coding.lower() for coding in codings] != ["chunked"] or request.version < (1, 1)):
        raise BadFraming("Transfer-Encoding must be chunked and nothing else, in HTTP/1.1.")
    return await handler(request)
