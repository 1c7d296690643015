"""A server for a web export: serves the files of one folder, with the headers that let a page use threads and load
nothing else.

It is made for a few visitors on a trusted network, and withstands hostile ones: a fixed number of threads, a deadline
    for every request, no listings, no files outside the folder.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.server import HTTPServer, SimpleHTTPRequestHandler
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, cast

from r2l_nerfstudio.errors import InputError

SECONDS_FOR_REQUEST = 5.0
"""Seconds in which a request's line and headers must arrive."""
SECONDS_FOR_PART = 20.0
"""Seconds in which 64 KiB of a file must be read."""
MOST_THREADS = 32
MOST_CONNECTIONS = 128
"""Connections served and waiting together; further ones are closed at once."""
_INLINE_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


class _Deadline(socket.SocketIO):
    """Reads from a socket with one deadline for all of them, so that a slow sender does not occupy a thread."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        super().__init__(connection, "r")
        self._connection = connection
        self._end = time.monotonic() + seconds

    def readinto(self, b: Any) -> int | None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not arrive in time")
        self._connection.settimeout(left)
        return super().readinto(b)


class WebHandler(SimpleHTTPRequestHandler):
    """Serve the files of one folder, isolated from other origins, as browsers require for pages with threads.

    Args: as `SimpleHTTPRequestHandler`, and `policy`, the Content-Security-Policy of all responses.
    """

    extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map,
        # The system's types of these differ, and browsers are strict about them.
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".json": "application/json",
        ".onnx": "application/octet-stream",
    }
    server_version = "r2l-export"
    sys_version = ""

    def __init__(self, *args: Any, policy: str, **kwargs: Any) -> None:
        self._policy = policy
        super().__init__(*args, **kwargs)

    def setup(self) -> None:
        super().setup()
        self.rfile = BufferedReader(_Deadline(self.connection, SECONDS_FOR_REQUEST))

    def send_head(self) -> BinaryIO | None:
        """Send a file's head as the base class does; without listings, and only for ordinary files in the folder."""
        self.connection.settimeout(SECONDS_FOR_PART)
        path = Path(self.translate_path(self.path))
        root = Path(self.directory).resolve()
        try:
            file = path.resolve()
            is_served = file.is_relative_to(root) and (
                file.is_file() or (file == root and (root / "index.html").resolve() == root / "index.html")
            )
        except (OSError, ValueError, RuntimeError):  # An invalid path, or a loop of links.
            is_served = False
        if not is_served:
            self.send_error(HTTPStatus.NOT_FOUND, "File not found")
            return None
        return super().send_head()

    def list_directory(self, path: Any) -> None:
        self.send_error(HTTPStatus.NOT_FOUND, "File not found")

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Content-Security-Policy", self._policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        # A new export in the same place is loaded at once; unchanged files are not sent again.
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: every file of a visitor would be a line."""


class WebServer(HTTPServer):
    """Serves a folder; port 0 takes a free port.

    Args:
        folder: folder with an index.html.
        host: name or address of the interface.
        port: to listen on.

    Raises:
        InputError: the port is in use, or the host is not an address of this machine.
    """

    request_queue_size = 128

    def __init__(self, folder: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        if not host.strip():
            raise InputError(
                '--host "" would listen on every network: choose 127.0.0.1 for this machine only, or 0.0.0.0 for all'
                " its networks."
            )
        self._room = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._threads = ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="web")
        try:
            super().__init__(
                (host, port), functools.partial(WebHandler, directory=str(folder), policy=page_policy(Path(folder)))
            )
        except (OSError, OverflowError, ValueError) as error:
            raise InputError(
                f"Nothing can be served at --host {host} --port {port} ({error}): choose another port, or 127.0.0.1"
                " for this machine only, 0.0.0.0 for all its networks."
            ) from error
        self.address = f"http://{'localhost' if host in ('127.0.0.1', '0.0.0.0') else host}:{self.server_address[1]}/"

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
        """Serve in a thread of the pool; connections beyond its capacity are closed."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        connection = cast(socket.socket, request)  # As for all TCP servers.
        connection.settimeout(SECONDS_FOR_PART)
        self._threads.submit(self._serve, connection, client_address)

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except Exception:  # A browser may disconnect in the middle of a file.
            pass
        finally:
            self.shutdown_request(request)
            self._room.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """Do nothing, as in `_serve`."""

    def server_close(self) -> None:
        super().server_close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def page_policy(folder: Path) -> str:
    """Return the Content-Security-Policy of a page: scripts, workers, models and images of its own folder only.

    Args:
        folder: folder with the page, whose inline scripts are allowed as they are now.
    """
    try:
        scripts = _INLINE_SCRIPT.findall((folder / "index.html").read_bytes())
    except OSError:
        scripts = []
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" for script in scripts]
    allowed = {
        "default-src": "'none'",
        "script-src": " ".join(["'self'", "'wasm-unsafe-eval'", *hashes]),
        "worker-src": "'self' blob:",
        "connect-src": "'self'",
        "img-src": "'self' data: blob:",
        "style-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'self'",
        "frame-ancestors": "'self'",
    }
    return "; ".join(f"{name} {sources}" for name, sources in allowed.items())
