"""A widget in this process without a notebook: its messages are taken from it and given to it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Cell:
    """What a notebook does for a widget: it passes messages on, as JSON."""

    def __init__(self, widget: Any, sent: list[Any]):
        self.widget, self.sent = widget, sent
        (self.first,) = [message["state"] for message in self.take() if "_esm" in message["state"]]

    def take(self) -> list[dict[str, Any]]:
        """What the widget has sent since the last call: changed values and answers."""
        messages = json.loads(json.dumps(self.sent, allow_nan=False))
        self.sent.clear()
        return messages

    def receive(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """Gives the widget a message of the page, and takes what it sends."""
        self.widget.comm.handle_msg({"content": {"data": json.loads(json.dumps(message))}, "buffers": []})
        return self.take()

    def change(self, **values: Any) -> list[dict[str, Any]]:
        return self.receive({"method": "update", "state": values})

    def ask(self, name: str, *values: Any) -> dict[str, Any]:
        """The widget's answer to a question of the page."""
        question = {"view": 1, "number": 7, "name": name, "values": values}
        (answer,) = self.receive({"method": "custom", "content": question})
        content = answer["content"]
        assert answer["method"] == "custom" and (content.pop("view"), content.pop("number")) == (1, 7)
        return content


@contextmanager
def recording() -> Iterator[list[Any]]:
    """The messages of widgets that are made meanwhile."""
    pytest.importorskip("anywidget", reason="pip install -e '.[notebook]'")
    import comm

    sent: list[Any] = []

    class Recorder(comm.DummyComm):
        def publish_msg(self, msg_type: str, data: Any = None, *more: Any, **others: Any) -> None:
            sent.append(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "create_comm", lambda **options: Recorder(**options))
        yield sent
