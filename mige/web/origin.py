"""Who may speak to the page: requests to a name of its own, sent by itself or by no web page at all.

A browser sends requests for every web page it shows. One of a foreign page names it (`Origin`), and one that reached
this server through a name which that page's owner made point here (DNS rebinding) names that (`Host`).
"""

import ipaddress
import re
import socket
from collections.abc import Iterable

from mige.web.event_body import BadRequestError

_HOST = re.compile(r"(?:[\w.-]{1,253}|\[[\da-f:.]{2,45}\])(?::\d{1,5})?", re.ASCII | re.IGNORECASE)


class OwnNames:
    """The names of this server: localhost, any address (no name leads to another server by one), and what is given.

    Args:
        host: where it listens.
        public: names by which visitors reach it besides, as "mige.example.org".
    """

    def __init__(self, host: str = "127.0.0.1", public: Iterable[str] = ()):
        self.public = {name.lower() for name in public}
        machine = socket.gethostname().lower()
        self.names = {"localhost", host.lower(), machine, f"{machine}.local"} | self.public

    def add(self, public: str) -> None:
        """One more name by which visitors reach this server."""
        self.public.add(public)
        self.names.add(public)

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raise BadRequestError for a request to another name, of another page, or with a host that is none."""
        hosts, origins = [], []
        for name, value in headers:
            text = value.decode("latin-1").strip().lower()
            if name in (b"host", b"x-forwarded-host"):
                if not all(_HOST.fullmatch(one.strip()) for one in text.split(",")):
                    message = f"The header “{name.decode()}” names no host: send one as in “example.org:7860”."
                    raise BadRequestError(message)
                hosts += [text] if name == b"host" else []
            elif name == b"origin":
                origins.append(text)
        for name in map(_name, hosts):
            if not self._is_own(name):
                message = f"This page is not served as “{name}”: start it with --public-host {name} if it is to be."
                raise BadRequestError(message, 403)
        for origin in origins:
            scheme, _, host = origin.partition("://")
            if scheme not in ("http", "https") or (host not in hosts and _name(host) not in self.public):
                raise BadRequestError("This request comes from another web page: open this one itself.", 403)

    def _is_own(self, name: str) -> bool:
        if name in self.names or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True


def _name(host: str) -> str:
    """A host without its port and the dot of its root."""
    return re.sub(r":\d{1,5}$", "", host).removesuffix(".")
