"""Which proxy the environment names for an upstream: `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY`, in either case.

curl, Go and Python's clients read them alike, with these rules:

- The scheme of the upstream decides: `HTTPS_PROXY` for https, `HTTP_PROXY` for http. The name in lower case wins; an
  empty value means no proxy.
- `NO_PROXY` has hosts without a proxy, separated by commas or blanks: `*`; `example.com` and all names below it, also
  as `.example.com` or `*.example.com`; an address or a network; any of them with a port.
- This machine itself has no proxy.
"""

import re
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

_PORTS = {"http": 80, "https": 443}
# An entry of NO_PROXY with a port: host:port or [IPv6]:port.
_WITH_PORT = re.compile(r"(\[[^\]]*\]|[^:]*):([0-9]{1,5})")

IpAddress = IPv4Address | IPv6Address


def environment_proxy(base_url: str, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """The variable that names a proxy for this upstream, and its value as a URL; None if there is no proxy for it."""
    url = urlsplit(base_url)
    host, port = (url.hostname or "").rstrip("."), url.port or _PORTS[url.scheme]
    name = next((name for name in (f"{url.scheme}_proxy", f"{url.scheme.upper()}_PROXY") if name in environ), None)
    value = environ[name].strip() if name else ""
    if name is None or not value:
        return None
    address = _address(host)
    if _is_this_machine(host, address):
        return None
    without_proxy = environ.get("no_proxy", environ.get("NO_PROXY", ""))
    if any(_covers(entry, host, port, address) for entry in without_proxy.replace(",", " ").lower().split()):
        return None
    return name, value if "://" in value else f"http://{value}"


def _address(host: str) -> IpAddress | None:
    try:
        found = ip_address(host)
    except ValueError:
        return None
    return found.ipv4_mapped or found if isinstance(found, IPv6Address) else found


def _is_this_machine(host: str, address: IpAddress | None) -> bool:
    if address is not None:
        return address.is_loopback or address.is_unspecified
    return host == "localhost" or host.endswith(".localhost")


def _covers(entry: str, host: str, port: int, address: IpAddress | None) -> bool:
    """Whether an entry of NO_PROXY, in lower case, covers this server."""
    if with_port := _WITH_PORT.fullmatch(entry):
        entry = with_port[1]
        if int(with_port[2]) != port:
            return False
    if address is not None:
        try:
            return entry == "*" or address in ip_network(entry.strip("[]"), strict=False)
        except ValueError:
            return False
    name = entry.removeprefix("*").removeprefix(".").rstrip(".")
    return entry == "*" or (name != "" and (host == name or host.endswith(f".{name}")))
