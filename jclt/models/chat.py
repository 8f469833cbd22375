"""Chats as text, by the template that comes with a model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from reprlib import repr as short
from typing import Any, NoReturn, TypeGuard

from jclt.errors import UserError, first_line

Messages = Sequence[Mapping[str, Any]]
"""`[{"role": "user", "content": "..."}, ...]`"""

MARK = "(here the answer goes on)\t\v"
"""Put at the end of a begun answer, to find that end in the text that the template gives. No template writes its spaces
of its own."""


@dataclass(frozen=True)
class ChatTemplate:
    """A model's template, in Jinja's language, and the special tokens that it writes by name (`bos_token` ...)."""

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)


def is_chat(prompt: object) -> TypeGuard[Messages]:
    """Whether a prompt is a list of messages."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], Mapping)


def check_messages(messages: Sequence[Any]) -> None:
    if not messages:
        raise UserError("prompt: no messages, expected at least one")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"prompt: message {number} is {short(message)}, expected its 'role' and 'content'")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise UserError(f"prompt: '{name}' of message {number} is {short(message.get(name))}, expected text")


def render_chat(template: ChatTemplate, messages: Messages, model: str) -> str:
    """The text of a chat up to where the assistant's answer begins; `model` is named in errors.

    If the last message is the assistant's, the text ends with it, and the model continues it.
    """
    check_messages(messages)
    if messages[-1]["role"] != "assistant":
        return _render(template, messages, True, model)
    begun = {**messages[-1], "content": messages[-1]["content"] + MARK}
    text = _render(template, [*messages[:-1], begun], False, model)
    end = text.rfind(MARK.strip())
    if end < 0:
        raise UserError(f"model {model}: its chat template leaves out the last message, expected it in the text")
    # A template that strips the spaces of the mark would have stripped those at the end of the answer.
    return text[:end] if text.startswith(MARK, end) else text[:end].rstrip()


def _render(template: ChatTemplate, messages: Messages, open_answer: bool, model: str) -> str:
    # Imported here because most prompts are no chats.
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks in templates what an assistant wrote, for training; the text is the same."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    # A template comes with a model from elsewhere: it runs in a sandbox.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    values = {"messages": [dict(message) for message in messages], "add_generation_prompt": open_answer}
    try:
        compiled = environment.from_string(template.source)
        return compiled.render(**template.tokens, tools=None, documents=None, **values)
    except Exception as error:  # a template can do anything that an expression can
        raise UserError(f"model {model}: its chat template refuses the messages ({first_line(error)})") from None
