"""Asks a language model behind an endpoint that speaks the protocol of OpenAI's chat completions: vLLM, llama.cpp,
Ollama and hosted services alike."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from jclt.errors import UserError, first_line, reason_of

KEY_VARIABLES = ("JCLT_API_KEY", "OPENAI_API_KEY")
"""Environment variables that can hold the key; the first that is set is sent."""
MOST_BYTES = 1 << 20
"""Of an answer that is read."""
LONGEST_WAIT = 60.0
TRIED_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)


class Endpoint(NamedTuple):
    url: str  # with or without /chat/completions
    model: str
    key: str = ""
    timeout: float = 60.0  # seconds for one try
    tries: int = 5
    first_wait: float = 1.0  # seconds before the second try; doubled before each further one


class NoAnswer(Exception):
    """The endpoint gave none, after all tries; another question may get one."""


def find_endpoint(url: str, model: str, **settings: Any) -> Endpoint:
    """The endpoint, with the key from the environment."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"endpoint {url!r}: expected an address such as http://localhost:8000/v1")
    key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), "")
    if not key.isascii() or not key.isprintable():
        raise UserError(
            f"endpoint {url}: the key in {' or '.join(KEY_VARIABLES)} is damaged, expected one line of ASCII"
        )
    return Endpoint(url, model, key, **settings)


def ask(endpoint: Endpoint, prompt: str, most_tokens: int, wait: Callable[[float], None] = time.sleep) -> str:
    """The answer's text. Tries again where that can help; a refusal that will not change is a `UserError`."""
    pause, reason = endpoint.first_wait, "never asked"
    for number in range(endpoint.tries):
        try:
            return _ask_once(endpoint, prompt, most_tokens)
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}: {_read_reason(error)}"
            if error.code not in TRIED_AGAIN:
                raise UserError(f"endpoint {endpoint.url}: {reason}, expected an answer to a chat") from None
            asked = error.headers.get("Retry-After", "")
            pause = max(pause, float(asked)) if asked.isdecimal() and len(asked) < 6 else pause
        except (OSError, http.client.HTTPException) as error:  # no connection, or none in time
            reason = reason_of(error)
        except ValueError as error:
            reason = first_line(error)
        if number + 1 < endpoint.tries:
            wait(min(pause, LONGEST_WAIT))
            pause *= 2
    raise NoAnswer(f"{reason} (after {endpoint.tries} tries)")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the address that the user named and to no other."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _ask_once(endpoint: Endpoint, prompt: str, most_tokens: int) -> str:
    question = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": most_tokens,
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    )
    url = endpoint.url.rstrip("/")
    url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
    request = urllib.request.Request(url, json.dumps(question).encode(), headers)
    with _OPENER.open(request, timeout=endpoint.timeout) as response:
        body = response.read(MOST_BYTES + 1)
    if len(body) > MOST_BYTES:
        raise ValueError("an answer that is too long")
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"no answer to a chat but {body[:60]!r}") from None
    if not isinstance(text, str):
        raise ValueError("an answer without a text")
    return text


def _read_reason(error: urllib.error.HTTPError) -> str:
    try:
        return " ".join(error.read(300).decode(errors="replace").split()) or error.reason
    except (OSError, http.client.HTTPException):
        return str(error.reason)
