"""What the workers of one machine have in common, and how each is told of it.

The parent binds the listeners, takes the database's lock and hands their numbers down: a worker inherits the files
themselves. All the rest goes through one socket between the two. The parent writes a line to begin with; the worker
answers once it serves; later the parent may tell it to leave. Either end sees by its closing that the other is gone.

A restart starts the code that is on the disk by then, so the line may have been written by another release than the
one that reads it: its names only ever grow.
"""

import socket
from dataclasses import dataclass

import orjson

from proxy.config.loader import Address

# As many as the server library asks for by itself.
_BACKLOG = 128
_LINE_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class InheritedResources:
    """One process' part. Who is alone has no more than a name and a database.

    `owner` is its name in the books. `api` and `admin` are the numbers of sockets that listen already, `lock` that of
    the lock on the database's file, where it is one; `metrics` is the folder in which all workers count; `dead` are
    owners that have certainly ended.
    """

    owner: str
    database: str
    api: tuple[int, ...] = ()
    admin: tuple[int, ...] = ()
    lock: int | None = None
    metrics: str | None = None
    dead: tuple[str, ...] = ()

    @property
    def numbers(self) -> tuple[int, ...]:
        """All files that are inherited."""
        return (*self.api, *self.admin, *(() if self.lock is None else (self.lock,)))

    def as_line(self) -> bytes:
        """To be written by the parent; it holds the database's password, so nobody else may see it."""
        return orjson.dumps(self) + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> "InheritedResources":
        """What the parent wrote. Names of a later release mean nothing yet."""
        given = {name: value for name, value in orjson.loads(line).items() if name in cls.__slots__}
        lists = {name: tuple(given[name]) for name in ("api", "admin", "dead") if name in given}
        return cls(**{**given, **lists})


def receive(control: socket.socket) -> InheritedResources:
    """Wait for the line that the parent writes; raises OSError where there is none."""
    line = b""
    while not line.endswith(b"\n"):
        part = control.recv(_LINE_BYTES)
        if not part:
            raise OSError("The parent of this worker is gone.")
        line += part
    return InheritedResources.of_line(line)


def listen(address: Address) -> list[socket.socket]:
    """Sockets that listen at an address, one for each that its host's name stands for. Raises OSError."""
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, where in sorted({(family, where[:2]) for family, *_, where in found}):
            sockets.append(socket.create_server((str(where[0]), int(where[1])), family=family, backlog=_BACKLOG))
    except OSError:
        for each in sockets:
            each.close()
        raise
    return sockets


def address_of(sockets: list[socket.socket]) -> Address | None:
    """Where they listen: the first of them; None where there are none."""
    if not sockets:
        return None
    host, port = sockets[0].getsockname()[:2]
    return Address(host, port)
