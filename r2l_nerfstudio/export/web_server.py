"""A server for a web export: the headers that let a page use threads, and nothing else."""

from __future__ import annotations

import functools
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from r2l_nerfstudio.errors import InputError


class WebHandler(SimpleHTTPRequestHandler):
    """Files of one folder, isolated from other origins, as browsers ask of pages with threads."""

    extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map,
        # What the system says of these differs, and browsers insist.
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".json": "application/json",
        ".onnx": "application/octet-stream",
    }

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        # A new export in the same place is seen at once; what did not change is not sent again.
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a visitor's every file would be a line."""


class WebServer(ThreadingHTTPServer):
    """Serves a folder; a port of 0 takes a free one.

    Args:
        folder: with an index.html.
        host: name or address of the interface.
        port: to listen on.

    Raises:
        InputError: the port is taken, or the host is none of this machine's.
    """

    daemon_threads = True

    def __init__(self, folder: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        try:
            super().__init__((host, port), functools.partial(WebHandler, directory=str(folder)))
        except (OSError, OverflowError) as error:
            raise InputError(
                f"Nothing can be served at --host {host} --port {port} ({error}): choose another port, or 127.0.0.1 for"
                " this machine alone, 0.0.0.0 for all its networks."
            ) from error
        self.address = f"http://{'localhost' if host in ('127.0.0.1', '0.0.0.0') else host}:{self.server_address[1]}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: a browser that leaves in the middle of a file is no error."""
