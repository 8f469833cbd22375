"""The page's server in this process, for tests that ask it, by themselves or in a browser."""

import contextlib
import threading
import time
from collections.abc import Iterator

import uvicorn

from jclt.viewer import server
from jclt.viewer.page_service import Page
from jclt.viewer.server import build_app

TOKEN = "a-token"


@contextlib.contextmanager
def running(page: Page) -> Iterator[int]:
    """The port of a server in this process."""
    port = 0
    with contextlib.closing(server.socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        app = build_app(page, TOKEN, [f"127.0.0.1:{port}", f"localhost:{port}"])
        served = server._Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=served.run, args=([listener],))
        thread.start()
        while not served.started:
            time.sleep(0.01)
        try:
            yield port
        finally:
            served.should_exit = True
            thread.join()
