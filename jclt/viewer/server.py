"""The page's server: this machine alone reaches it, and only who knows the random token in its address.

Every path begins with the token. Requests with another host or origin are refused, so that no other page in the same
browser can ask anything, not even under a name that leads to this machine.
"""

import logging
import secrets
import signal
import socket
import threading
import webbrowser
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from typing import Any
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jclt.errors import UserError, first_line, reason_of
from jclt.files import parse_object
from jclt.viewer.page_files import read_page_files
from jclt.viewer.page_service import Page

log = logging.getLogger(__name__)

Respond = Callable[[Request], Awaitable[Response]]

ADDRESS = "127.0.0.1"
MOST_JSON, MOST_UPLOAD = 1 << 20, 1 << 29
"""Bytes of a request."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


def build_app(page: Page, token: str, hosts: Sequence[str]) -> ASGIApp:
    """The application; it answers to these hosts (with port) alone."""
    graph = "/api/graphs/{name}"
    routes = [
        Route("/", send_file),
        Route("/{file}", send_file),
        Route("/api/graphs", answer(page.list_graphs)),
        Route("/api/upload", receive_graph(page), methods=["POST"]),
        Route("/api/attribute", answer_post(page.attribute), methods=["POST"]),
        Route(graph, answer(page.show, "name")),
        Route(f"{graph}/view", answer_post(page.library.change_view, "name"), methods=["POST"]),
        Route(f"{graph}/intervene", answer_post(page.intervene, "name"), methods=["POST"]),
        Route(f"{graph}/features/{{layer:int}}/{{feature:int}}", answer(page.describe, "name", "layer", "feature")),
        Route(f"{graph}/page.html", send_page(page)),
        Route(f"{graph}/export.json", send_export(page)),
        Route("/generate-graph", answer_post(page.generate_graph), methods=["POST"]),
        Route("/forward-pass", answer_post(page.find_likeliest), methods=["POST"]),
        Route("/steer", answer_post(page.steer), methods=["POST"]),
    ]
    errors = {UserError: show_user_error, HTTPException: show_http_error, Exception: show_other_error}
    return guard(Starlette(routes=routes, exception_handlers=errors), token, hosts)


def answer(work: Callable[..., Any], *names: str) -> Respond:
    """Answers with what a function makes of these parts of the path."""

    async def respond(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(work, *(request.path_params[name] for name in names)))

    return respond


def answer_post(work: Callable[..., Any], *names: str) -> Respond:
    """Answers with what a function makes of these parts of the path and of the JSON object in the body."""

    async def respond(request: Request) -> Response:
        content = parse_object(await read_body(request, MOST_JSON), "request")
        return JSONResponse(await run_in_threadpool(work, *(request.path_params[name] for name in names), content))

    return respond


def receive_graph(page: Page) -> Respond:
    async def respond(request: Request) -> Response:
        name, content = request.query_params.get("name", "graph.json"), await read_body(request, MOST_UPLOAD)
        return JSONResponse(await run_in_threadpool(page.upload, name, content))

    return respond


def send_page(page: Page) -> Respond:
    async def respond(request: Request) -> Response:
        name = request.path_params["name"]
        return make_attachment(await run_in_threadpool(page.build_file, name), "text/html", "graph.html")

    return respond


def send_export(page: Page) -> Respond:
    async def respond(request: Request) -> Response:
        thresholds = (read_share(request, "nodes"), read_share(request, "edges"))
        text = await run_in_threadpool(page.export, request.path_params["name"], *thresholds)
        return make_attachment(text, "application/json", "graph.json")

    return respond


def guard(app: ASGIApp, token: str, hosts: Sequence[str]) -> ASGIApp:
    """Refuses requests to another host, from another origin or without the token; adds headers to all answers."""
    origins = [f"http://{host}" for host in hosts]

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        path, start = scope["path"], f"/{token}"
        if headers.get(b"host", "") not in hosts or headers.get(b"origin", origins[0]) not in origins:
            refusal = JSONResponse({"error": "another host or origin"}, 403)
        elif not secrets.compare_digest(path[: len(start) + 1].encode(), f"{start}/".encode()):
            refusal = JSONResponse({"error": "not found"}, 404)
        else:
            inside = path[len(start) :]
            await app({**scope, "path": inside, "raw_path": None}, receive, send_with_headers)
            return
        await refusal(scope, receive, send_with_headers)

    return respond


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request; an error as soon as it is too large."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise HTTPException(413, f"request of more than {most} bytes")
        parts.append(part)
    return b"".join(parts)


def read_share(request: Request, name: str) -> float:
    try:
        return float(request.query_params.get(name, "1"))
    except ValueError:
        raise UserError(f"{name}: expected a share between 0 and 1") from None


def make_attachment(text: str, kind: str, name: str) -> Response:
    return Response(text, media_type=kind, headers={"content-disposition": f'attachment; filename="{name}"'})


async def send_file(request: Request) -> Response:
    """One of the page's own files, by name: no path of a request is ever opened."""
    found = read_page_files().get(request.path_params.get("file", "index.html"))
    if found is None:
        raise HTTPException(404, "not found")
    content, kind = found
    return Response(content, media_type=kind)


async def show_user_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)


async def show_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)


async def show_other_error(request: Request, error: Exception) -> Response:
    log.warning("%s: %s", request.url.path.rpartition("/")[2], first_line(error))
    return JSONResponse({"error": f"failed: {first_line(error)}"}, 500)


class _Server(uvicorn.Server):
    """Without uvicorn's handling of signals."""

    def capture_signals(self) -> Any:
        return nullcontext()


def serve_page(page: Page, *, port: int = 0, first: str | None = None, open_browser: bool = True) -> None:
    """Serves until Ctrl-C."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((ADDRESS, port))
            listener.listen(128)
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port}: cannot be used ({reason_of(error)}), expected a free one") from None
        port, token = listener.getsockname()[1], secrets.token_urlsafe(24)
        app = build_app(page, token, [f"{ADDRESS}:{port}", f"localhost:{port}"])
        config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        server = _Server(config)
        url = f"http://{ADDRESS}:{port}/{token}/" + (f"#graph={quote(first)}" if first else "")
        print(f"The page is at {url}\nCtrl-C ends it.", flush=True)

        def stop(number: int, frame: object) -> None:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # nothing about requests that it cuts off
            server.should_exit = True

        former = [(number, signal.signal(number, stop)) for number in (signal.SIGINT, signal.SIGTERM)]
        if open_browser:
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        try:
            server.run(sockets=[listener])
            if page.running.locked():
                print("Waiting for the end of a computation that still runs.", flush=True)
        finally:
            for number, handler in former:
                signal.signal(number, handler)
