"""What connections to upstreams need beside HTTP: TCP keep-alive, trusted certificates, and a proxy's credentials."""

import base64
import contextlib
import socket
import ssl
from urllib.parse import unquote, urlsplit

# Firewalls and NAT gateways forget a connection on which nothing passes, the strictest after a few minutes, and then
# drop its packets silently. After 60 s of silence the system asks the other side whether it is still there, and again
# every 15 s. After four questions without an answer, at 12:02:00 for a silence since 12:00:00, the connection is
# closed.
_IDLE_S = 60
_INTERVAL_S = 15
_QUESTIONS = 4
_KEEP_ALIVE = tuple(
    (getattr(socket, name), value)
    # macOS has the first one under the name TCP_KEEPALIVE.
    for name, value in (
        ("TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE", _IDLE_S),
        ("TCP_KEEPINTVL", _INTERVAL_S),
        ("TCP_KEEPCNT", _QUESTIONS),
    )
    if hasattr(socket, name)
)

# An address as `getaddrinfo` returns it: family, type, protocol, canonical name, address.
Address = tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]]


def keep_alive(connection: socket.socket) -> None:
    """Have the system notice when the other side of a TCP connection is gone. Other sockets are left as they are."""
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):  # some systems refuse it for a connection that is gone already
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEP_ALIVE:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)


def upstream_socket(address: Address) -> socket.socket:
    """A new socket for a connection to this address."""
    family, type_, protocol, *_ = address
    made = socket.socket(family, type_, protocol)
    keep_alive(made)
    return made


def tls_context(certificates: str) -> ssl.SSLContext:
    """TLS that trusts these certificates (PEM) and those of the system. Making one takes 10 ms or more.

    The system's are those that `SSL_CERT_FILE` and `SSL_CERT_DIR` name, if they are set.
    """
    context = ssl.create_default_context()
    context.load_verify_locations(cadata=certificates)
    context.set_alpn_protocols(("http/1.1",))
    return context


def proxy_authorization(proxy_url: str) -> str | None:
    """The value of `Proxy-Authorization` for the user and password in a proxy's URL; None if it has no user."""
    url = urlsplit(proxy_url)
    if not url.username:
        return None
    credentials = f"{unquote(url.username)}:{unquote(url.password or '')}"
    return "Basic " + base64.b64encode(credentials.encode()).decode()
