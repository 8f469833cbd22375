"""A server on this machine that answers like a language model's endpoint, as a test says."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from jclt.features.endpoint import Endpoint, find_endpoint


@dataclass
class Server:
    url: str
    answer: Callable[[str], Any]  # a function of the prompt: a text, or a status, or bytes
    asked: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)


@contextmanager
def serve(answer: Callable[[str], Any]) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(question)
            server.headers.append(dict(self.headers) | {"path": self.path})
            got = server.answer(question["messages"][0]["content"])
            status, body = (got, b"<html>busy</html>") if isinstance(got, int) else (200, got)
            if isinstance(body, str):
                body = json.dumps({"choices": [{"message": {"content": body}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Location", server.url + "/elsewhere")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *arguments):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.handle_error = lambda request, client_address: None  # the client has gone
    server = Server(f"http://127.0.0.1:{listening.server_port}/v1", answer)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


def connect(server: Server, **settings: Any) -> Endpoint:
    return find_endpoint(server.url, "stub", **{"first_wait": 0.0, "timeout": 5.0, "tries": 3} | settings)
