"""For whom the live pages answer: the names that this machine is reached by, and no others.

A web page of anybody's can have its own name lead to this machine (DNS rebinding); the browser then takes the pages for
that page's own, and lets it read and press what it likes. What gives it away is the name that it asks for.
"""

import ipaddress
import socket
from collections.abc import Callable, Collection, Iterable
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")
EVERYWHERE = ("", "0.0.0.0", "::")

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]  # as WSGI has it


def own_names(bound: str) -> frozenset[str]:
    """The names of a server that listens at the address `bound`: loopback's, its own, and if that is every address of
    this machine, the machine's names."""
    machine = (socket.gethostname(), socket.getfqdn()) if bound in EVERYWHERE else ()
    return frozenset(name.lower().rstrip(".") for name in (*LOOPBACK, bound, *machine) if name)


def answers_for(asked: str, names: Collection[str], bound: str) -> bool:
    """Whether a request with the header `Host: asked` is answered.

    On every address of this machine any address is taken, as a page that was sent from elsewhere is asked for by name.
    """
    try:
        name = (urlsplit(f"//{asked}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return bound in EVERYWHERE


def only_for(app: App, names: Collection[str], bound: str) -> App:
    """The app, which answers 403 to whoever asks for it by another name, or from a page of another name."""

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        asked, page = environ.get("HTTP_HOST", ""), environ.get("HTTP_ORIGIN")
        if answers_for(asked, names, bound) and (page is None or answers_for(urlsplit(page).netloc, names, bound)):
            return app(environ, start)
        start("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"This name is not one of this server's: nas dashboard --allow-host NAME adds it.\n"]

    return answer
