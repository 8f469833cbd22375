"""A browser, a page of published graphs, and a tab that must see no error and ask no other address."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_browser import NAME, PUBLISHED
from page_server import running

from jclt.viewer.library import Library
from jclt.viewer.page_service import Page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]'")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copy(PUBLISHED / f"{NAME}.json.gz", tmp_path)
    shutil.copy(PUBLISHED / "dollar-gemma-2-2b-part.json.gz", tmp_path)
    return tmp_path


@pytest.fixture
def port(folder) -> Iterator[int]:
    with running(Page(Library([folder]))) as port:
        yield port


@pytest.fixture
def tab(browser, request) -> Iterator[Any]:
    """A tab that must see no error and ask no other address."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    tab, wrong = context.new_page(), []
    tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    local = ("http://127.0.0.1:", "data:", "blob:", "file:")
    tab.on("request", lambda asked: None if asked.url.startswith(local) else wrong.append(asked.url))
    tab.wrong = wrong
    yield tab
    context.close()
    assert wrong == []
