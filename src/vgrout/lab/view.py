"""`vgrout view`: a page about runs with all their rollouts, served to this machine alone."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rich.console import Console

from vgrout.lab.report import page
from vgrout.types import UserError

HOST = "127.0.0.1"
LIMIT = 1_000_000  # rollouts of a page


def handler(html: bytes) -> type[BaseHTTPRequestHandler]:
    """Answers GET / with the page, and nothing else; nobody else's page may read it under another name of this host."""
    squeezed = gzip.compress(html, mtime=0)

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 - the library's name
            own = {f"{name}:{self.server.server_address[1]}" for name in (HOST, "localhost")}
            if self.headers.get("Host") not in own or self.path.split("?")[0] != "/":
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            small = "gzip" in self.headers.get("Accept-Encoding", "")
            body = squeezed if small else html
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            if small:
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            return None

    return Page


def bind(paths: Sequence[Path], port: int, console: Console) -> ThreadingHTTPServer:
    """A server of the page on `port`, any free one for 0. Raises UserError."""
    if not 0 <= port < 2**16:
        raise UserError(f"port = {port}: give a number from 0 to 65535")
    with console.status("reading runs and drawing"):
        html, _, unread = page(paths, LIMIT)
    for reason in unread.values():
        console.print(f"could not be read: {reason}", style="yellow", markup=False, soft_wrap=True)
    try:
        return ThreadingHTTPServer((HOST, port), handler(html.encode()))
    except OSError as error:
        raise UserError(f"cannot serve on port {port}: {error.strerror}") from None


def view(paths: Sequence[Path], port: int, console: Console) -> None:
    """Serve until interrupted. Raises UserError."""
    with bind(paths, port, console) as server:
        console.print(f"http://{HOST}:{server.server_address[1]}/  (Ctrl-C ends it)", soft_wrap=True)
        server.serve_forever()
