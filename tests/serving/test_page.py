"""The page: it asks what exists, loads nothing from outside, and in a browser it does what its buttons say."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
import shutil
from html.parser import HTMLParser

import httpx
import openai
import pytest

from jax_ccm.serving.access import Access
from jax_ccm.serving.requests import Defaults
from tests.serving.clients import MODEL, ask, serving

TEXT = (importlib.resources.files("jax_ccm.serving") / "page.html").read_text()


class Tags(HTMLParser):
    """All tags with their attributes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_it_names_only_what_exists(url, server):
    """Each path in its script is a route of the server, for the method that it is asked with."""
    script = re.search("(?s)<script>(.*)</script>", TEXT)[1]
    paths = {re.sub(r"\$\{[^}]*\}", "nobody", path) for path in re.findall(r"""["`](/[^"`]*)["`]""", script)}
    assert {"/v1/models", "/v1/chat/completions", "/v1/responses", "/sessions/nobody"} <= paths
    routes = {route.path for route in _routes(server[1])}
    for path in paths:
        assert any(re.fullmatch(re.sub(r"\{[^}]*\}", "[^/]+", route), path) for route in routes), path
    assert httpx.get(f"{url}/sessions/nobody").status_code == 404


def _routes(pool):
    from jax_ccm.serving.app import Server

    return Server(pool, Defaults(MODEL), Access()).app().routes


def test_it_loads_nothing_from_outside(url):
    """No address but those of the server, no handler or style in a tag, and a policy that would stop either."""
    answer = httpx.get(url)
    assert answer.status_code == 200 and answer.text == TEXT
    tags = Tags()
    tags.feed(TEXT)
    for tag, attributes in tags.found:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        for name in ("src", "href", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert re.findall(r"https?://[^' ]+", TEXT) == ["http://www.w3.org/2000/svg"]  # the name of a format, never asked
    assert not re.search(r"@import|url\(|innerHTML|eval\(|insertAdjacentHTML|document\.write", TEXT)
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'" and "unsafe" not in answer.headers["content-security-policy"]
    for tag in ("script", "style"):
        (part,) = re.findall(f"(?s)<{tag}>(.*?)</{tag}>", TEXT)
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"


def test_a_session_in_numbers(client, url):
    """What the page draws: which turn each slot is of, the bytes now, and those of full context."""
    for text in ("my name is Clara", "what"):
        ask(client, text, "drawn")
    held = httpx.get(f"{url}/sessions/drawn").json()
    turns = [slot["turn"] for slot in held["slots"] if slot["kind"] == "memory"]
    assert held["id"] == "drawn" and held["turns"] == 2 and set(turns) == {1, 2} and turns == sorted(turns)
    assert turns.count(1) == turns.count(2) and [slot["kind"] for slot in held["slots"] if not slot["turn"]] == ["sink"]
    assert held["tokens"] > 20 and held["full_context_bytes"] * len(held["slots"]) == held["bytes"] * held["tokens"]
    assert "ccm_concat" in held["method"]


def sync_api():
    return pytest.importorskip("playwright.sync_api", reason="no playwright: pip install '.[test]'")


@pytest.fixture(scope="module")
def browser():
    """A browser; skips where there is none."""
    playwright = sync_api()
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as made:
        try:
            found = made.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as e:
            pytest.skip(f"no Chromium to look at the page with: {str(e).splitlines()[0]}")
        yield found
        found.close()


@pytest.mark.parametrize("width, scheme", [(360, "light"), (1200, "dark")])
def test_in_a_browser(browser, made, tmp_path, width, scheme):
    """Said, answered, forked, compared, deleted; nothing sticks out, and the browser has nothing to complain of."""
    with serving(made, tmp_path / "sessions", Access(token="secret")) as (url, pool):
        context = browser.new_context(viewport={"width": width, "height": 740}, color_scheme=scheme)
        page, see = context.new_page(), sync_api().expect
        see.set_options(timeout=60_000)
        wrong, asked = [], []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{url}/#clara")
        page.wait_for_selector("#token:visible")
        assert wrong and all("401" in text for text in wrong)
        wrong.clear()
        page.fill("#token", "secret")
        page.press("#token", "Enter")
        see(page).to_have_title("tiny · jax_ccm")
        wrong.clear()  # a session that is not there yet is 404
        page.fill("#text", "my name is Clara")
        page.press("#text", "Enter")
        see(page.locator("#status")).to_contain_text("1 turn,")
        if width < 400:
            assert not page.locator("#slots").is_visible()
            page.click("#memory summary")
        assert page.locator("#slots i").count() == 2 * 2 + 1 and page.locator("#slots figure").count() == 2
        # A fork that another page made is not written over.
        bearer = {"authorization": "Bearer secret"}
        there = httpx.get(f"{url}/sessions/clara/memory", headers=bearer).content
        assert httpx.put(f"{url}/sessions/clara-fork-1/memory", content=there, headers=bearer).status_code == 200
        page.click("#fork")
        see(page.locator("#session")).to_have_value("clara-fork-2")
        wrong.clear()  # that the second one is not there is 404
        before = pool.do(lambda: pool.saved("clara").read_bytes())
        page.select_option("#other", "clara")
        page.fill("#text", "what")
        page.click("#compare")
        see(page.locator(".beside > div")).to_have_count(3)
        see(page.locator("#send")).to_be_enabled()
        texts = page.locator(".beside p:nth-of-type(1)").all_text_contents()
        costs = page.locator(".beside .soft").all_text_contents()
        assert texts[0] == texts[1] and all("first token after" in cost for cost in costs), costs
        assert "memory stood for 0;" in costs[2] and "memory stood for 0;" not in costs[0]
        assert pool.do(lambda: pool.saved("clara").read_bytes()) == before
        # What was answered last is in sight, above the form, which on a narrow screen lies over the page.
        last, form = page.locator("#talk .turn").last.bounding_box(), page.locator("#say").bounding_box()
        assert last["y"] + last["height"] <= form["y"] + 1 and last["y"] + last["height"] > 0
        page.screenshot(path=tmp_path / f"page-{width}-{scheme}.png")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
            assert ask(client, "what", "clara").choices[0].message.content.strip() == texts[0].strip()
        page.on("dialog", lambda dialog: dialog.accept())
        page.click("#delete")
        see(page.locator("#status")).to_have_text("The memory is empty.")
        assert pool.do(pool.names) == {"clara", "clara-fork-1"}
        assert all(each.startswith((url, "data:")) for each in asked)
        assert [text for text in wrong if "404" not in text] == []
        context.close()
