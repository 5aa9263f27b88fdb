"""Which Host names are answered, on whose pages the demo may stand, and who asks."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
EVERYWHERE = ("0.0.0.0", "::", "[::]")


def guards(host: str, more: Sequence[str] = ()) -> list[Middleware]:
    """Middleware against pages of others: they may neither rebind a name of theirs to this server nor frame it.

    Args:
        host (`str`):
            Where the server listens.
        more (`Sequence[str]`, *optional*):
            Other names it is reached by, such as that of a proxy.
    """
    space = os.environ.get("SPACE_HOST")  # On a Space, which the Hub shows in a frame of its own page.
    hosts = [*LOOPBACK, *own_names(host), *more, *(space.split(",") if space else ())]
    headers = {"Content-Security-Policy": "frame-ancestors https://huggingface.co"}
    return [
        Middleware(WithHeaders, headers=headers if space else {"X-Frame-Options": "DENY"}),
        Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
    ]


def own_names(host: str) -> list[str]:
    """The name that is listened on; for all addresses of the machine its name and what that resolves to."""
    if host not in EVERYWHERE:
        return [bracketed(host)]
    name = socket.gethostname()
    try:
        addresses = {str(address[0]) for *_, address in socket.getaddrinfo(name, None)}
    except OSError:
        addresses = set()
    return [name, *map(bracketed, sorted(addresses))]


def address_of(request: Any) -> str:
    """The address a request comes from, for limits on what one may ask for.

    On a Space it comes from a proxy. Proxies append to `X-Forwarded-For`, and what stands before, anybody can send:
    the last public address counts, behind which are the proxies' own.
    """
    forwarded = request.headers.get("x-forwarded-for", "") if "SPACE_HOST" in os.environ else ""
    for address in reversed(forwarded.split(",")):
        with suppress(ValueError):
            if ip_address(address.strip()).is_global:
                return address.strip()
    return str(getattr(request.client, "host", ""))


def bracketed(host: str) -> str:
    """Write an IPv6 address as a Host header does."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


class WithHeaders:
    """Add headers to every response."""

    def __init__(self, app: ASGIApp, headers: dict[str, str]):
        self.app, self.headers = app, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        await self.app(scope, receive, send_with_headers)
