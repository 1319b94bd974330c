"""The web page in a real headless Chromium, against the real HTTP server of tests/api.

Beside that server's own routes there is a chat route in OpenAI's form that says a given text; what
the engine would report is written into the store and an iteration log.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, sync_playwright

from flexllm_vllm.scheduler.iterations import IterationLog
from tests.api.conftest import (
    Server,
    client,
    serve,
    server,
    start_server,
    toy_tokenizer,
    upload,
)
from tests.web.web_site import LAPTOP, OpenPage, Site, Speaker, Watched, add_chat, add_models

__all__ = ["client", "serve", "server", "start_server", "toy_tokenizer", "upload"]

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def served_name() -> str:
    """Of the base model."""
    return "demo"


@pytest.fixture
def site(server: Server, served_name: str) -> Site:
    """The whole server of the page."""
    speaker = Speaker()
    server.service.base_models = (served_name,)
    add_models(server, served_name)
    add_chat(server.app, speaker)
    log = IterationLog()

    async def last_iterations(last: int) -> list[dict[str, Any]]:
        return log.last(last)

    server.service.fetch_iterations = last_iterations
    return Site(server, log, speaker, served_name)


# Not for the session: Playwright's event loop runs in this thread until its end, and other tests
# begin one of their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for the tests of a file."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium on this machine (docs/web-page.md says how to get one)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, site: Site) -> Iterator[OpenPage]:
    """Open the page in a fresh profile. ``allowed`` names console errors that the test provokes."""
    opened: list[tuple[Any, Watched, tuple[str, ...]]] = []

    def open_page(
        path: str = "",
        viewport: dict[str, int] = LAPTOP,
        url: str | None = None,
        allowed: tuple[str, ...] = (),
        **options: Any,
    ) -> Page:
        context = browser.new_context(viewport=viewport, **options)
        page = context.new_page()
        page.set_default_timeout(15_000)
        watched = Watched()
        page.on("console", lambda message: _note(message, watched))
        page.on("pageerror", lambda error: watched.errors.append(str(error)))
        base = url or site.url

        def only_this_host(route: Route) -> None:
            asked = route.request.url
            if asked.startswith((base.rsplit("/finetuning", 1)[0], "blob:", "data:")):
                route.continue_()
            else:
                watched.other_hosts.append(asked)
                route.abort()

        page.route("**/*", only_this_host)
        opened.append((context, watched, allowed))
        page.goto(base + path)
        return page

    yield open_page
    for context, watched, allowed in opened:
        context.close()
        unexpected = [e for e in watched.errors if not any(text in e for text in allowed)]
        assert unexpected == []
        assert watched.other_hosts == []


def _note(message: ConsoleMessage, watched: Watched) -> None:
    if message.type in ("error", "warning"):
        watched.errors.append(message.text)


@pytest.fixture
def training_file(tmp_path: Path) -> Path:
    """Two examples on disk."""
    path = tmp_path / "orders.jsonl"
    line = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    path.write_text((json.dumps(line) + "\n") * 2)
    return path
