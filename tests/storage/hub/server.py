"""A small Hub on loopback for the tests: the HTTP that the client speaks, in memory, with faults to order.

Tokens: `hf_write` may write as the user `me`, `hf_read` may only read, `hf_fine` may write to `me/fine`; others are
not valid. Every request is recorded with its step, method, path, headers and body.
"""

import json
import re
import socket
import struct
import threading
import time
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.storage.hub.answers import Answers
from tests.storage.hub.state import STEPS, Fault, State, git_oid


class Hub:
    """A running server; `with Hub() as hub:`, then `hub.url` and `hub.state`."""

    def __init__(self) -> None:
        self.state = State()
        handler = type("Bound", (Handler,), {"hub": self})
        # Xet redirects must leave the origin, or the client follows them at once.
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.other_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def reset(self, **settings: Any) -> State:
        self.state = State(**settings)
        return self.state

    def __enter__(self) -> "Hub":
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Nowhere:
    def write(self, data: bytes) -> int:
        return len(data)

    def flush(self) -> None:
        pass


class Handler(Answers):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are sent apart, which would wait for an acknowledgment
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (OSError, ValueError):  # a connection that was cut, here or there
            self.close_connection = True

    def _handle(self) -> None:
        self.state, address = self.hub.state, urlsplit(self.path)
        self.route, self.query = unquote(address.path), parse_qs(address.query)
        self.changed = self.halved = False
        named = (s for s, method, path in STEPS if method == self.command and re.fullmatch(path, self.route))
        step = next(named, "unknown")
        entry = {"step": step, "method": self.command, "path": self.path, "headers": dict(self.headers), "body": b""}
        self.state.requests.append(entry)
        fault = next((fault for fault in self.state.faults if fault.step == step and fault.times != 0), None)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None:
            fault.times -= 1
            if fault.kind == "cut before":
                return self._cut()
            if fault.kind == "cut body":
                self.rfile.read(length // 2)
                return self._cut()
        self.body = entry["body"] = self.rfile.read(length)
        if fault is not None and self._inject(fault):
            return None
        return self._answer(step)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _inject(self, fault: Fault) -> bool:
        """Whether the fault was the answer."""
        if fault.kind.isdigit():
            self._send(int(fault.kind), {"error": "injected"}, fault.headers)
            return True
        if fault.kind == "html":
            self._send(502, b"<html>Bad gateway</html>", {"Content-Type": "text/html"})
            return True
        if fault.kind == "answer lost":
            real, self.wfile = self.wfile, _Nowhere()  # type: ignore[assignment]
            try:
                self._answer(fault.step)
            finally:
                self.wfile = real
            self._cut()
            return True
        if fault.kind == "other commit":
            name = self.route.split("/")[3] + "/" + self.route.split("/")[4]
            oid = git_oid(b"other")
            self.state.blobs[oid] = b"other"
            self.state.add_commit(name, "main", {"other.txt": ("regular", oid)})
        elif fault.kind == "delay":
            time.sleep(fault.seconds)
        elif fault.kind == "corrupt":
            self.changed = True
        else:
            assert fault.kind == "truncate", fault.kind
            self.halved = True
        return False

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        if self.command == "GET" and self.changed:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.halved else data)
            if self.halved:
                self._cut()
