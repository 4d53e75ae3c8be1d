"""`rdpo watch`: the live page of a run over HTTP. It only reads, and answers nobody but who may see the run.

On loopback that is whoever is on this machine; a page of another site that has its own name point here is refused by
the Host header. On any other address it takes the token that is made at the start.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import secrets
import socket
import socketserver
import sys
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from rdpo.errors import InputError
from rdpo.records import digest, visible
from rdpo.report.site import Answer, Site

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
TOKEN = "token"
SILENT_S = 30
HEADERS = {
    "Cache-Control": "no-cache",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class WatchServer(ThreadingHTTPServer):
    """Serves a site at an address.

    Args:
        site: what is served.
        host: a name or address of this machine.
        port: 0 for any that is free.

    Raises:
        InputError: there is no such address here, or the port is taken.
    """

    # Two servers at one port would each have some of the requests.
    allow_reuse_port = False

    def __init__(self, site: Site, host: str, port: int):
        family, address = _resolved(host, port)
        self.address_family = family
        self.site, self.host = site, host
        on_loopback = ipaddress.ip_address(address[0]).is_loopback
        self.token = None if on_loopback else secrets.token_urlsafe(24)
        try:
            super().__init__(address, _Handler)
        except OSError as error:
            raise InputError(_refused(host, port, error)) from None

    def server_bind(self) -> None:
        """Take the address, without asking a name server for its name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        """What to open in a browser, with the token where there is one."""
        everywhere = ipaddress.ip_address(self.server_name).is_unspecified
        name = socket.gethostname() if everywhere else self.host
        name = f"[{name}]" if ":" in name else name
        return f"http://{name}:{self.server_port}/" + (f"?{TOKEN}={self.token}" if self.token else "")

    @property
    def cookie(self) -> str:
        """Name of the cookie with the token: a browser sends those of all ports of a machine to each."""
        return f"rdpo-watch-{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A viewer that goes away is no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One request: a page is asked for by those who may see it, or refused."""

    server: WatchServer
    server_version, sys_version = "rdpo", ""
    timeout = SILENT_S

    def do_GET(self) -> None:
        """A page, or its state."""
        self._send(self._answer())

    def do_HEAD(self) -> None:
        """The same without its content."""
        self._send(self._answer())

    def _not_allowed(self) -> None:
        self._send(Answer(405, b"this page is only to be read\n"))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _not_allowed

    def log_message(self, *_: object) -> None:
        """Nothing is printed of requests, whose addresses may hold the token."""

    def _answer(self) -> Answer:
        if self.server.token is None and _host_in(self.headers.get("Host", "")) not in self._names:
            return Answer(403, b"open this page by the address that `rdpo watch` printed\n")
        if self.server.token is not None and not self._has_token(self.server.token):
            return Answer(403, b"open this page by the address that `rdpo watch` printed, with its token\n")
        try:
            return self.server.site.answer(unquote(urlsplit(self.path).path))
        except Exception as error:
            # A run that is at work may remove what is being read; what is asked for later is there again.
            said = f"not to be read at the moment: {type(error).__name__}: {error}"
            return Answer(503, visible(said).encode("utf-8", "replace"))

    @property
    def _names(self) -> set[str]:
        return {*LOOPBACK, self.server.host.lower()}

    def _has_token(self, token: str) -> bool:
        given = [*parse_qs(urlsplit(self.path).query).get(TOKEN, ()), *self._cookies()]
        return any(hmac.compare_digest(one.encode(), token.encode()) for one in given)

    def _cookies(self) -> list[str]:
        try:
            cookies = SimpleCookie(self.headers.get("Cookie", ""))
        except CookieError:
            return []
        return [cookies[self.server.cookie].value] if self.server.cookie in cookies else []

    def _send(self, answer: Answer) -> None:
        tag = f'"{digest(answer.kind, answer.content.hex())}"'
        known = answer.status == 200 and tag in self.headers.get("If-None-Match", "")
        self.send_response(304 if known else answer.status)
        for name, value in self._headers(answer, tag).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and not known:
            self.wfile.write(answer.content)

    def _headers(self, answer: Answer, tag: str) -> dict[str, str]:
        headers = {**HEADERS, "Content-Security-Policy": f"{answer.policy}; frame-ancestors 'none'"}
        headers |= {"Content-Type": answer.kind, "Content-Length": str(len(answer.content))}
        if answer.status == 200:
            headers["ETag"] = tag
            if self.server.token:
                headers["Set-Cookie"] = f"{self.server.cookie}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
        if answer.status == 405:
            headers["Allow"] = "GET, HEAD"
        if answer.status == 503:
            headers["Refresh"] = "3"
        return headers | ({"Location": answer.moved} if answer.moved else {})


def _resolved(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """The address that a host's name stands for here."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, OverflowError):
        raise InputError(f"--host {host}: no such machine is known; give a name or address of this one") from None
    return found[0][0], found[0][4]


def _refused(host: str, port: int, error: OSError) -> str:
    """Why an address cannot be had, and the remedy."""
    if error.errno == errno.EADDRINUSE:
        return f"--port {port}: another program listens there; give another one, or 0 for any that is free"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host}: is no address of this machine; give one that is, or 0.0.0.0 for all"
    return f"--port {port}: cannot be had ({error.strerror}); give another one, or 0 for any that is free"


def _host_in(header: str) -> str | None:
    """The host in a Host header, whatever the port: the request may have come through a tunnel."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None
