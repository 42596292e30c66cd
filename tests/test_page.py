"""The page in a real Chromium, before a real gunicorn and a scripted upstream."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from service import ROOT, Service, small_routes
from upstream import Upstream, error, slow, whole

from judge import VERDICTS

waits = pytest.importorskip("selenium.webdriver.support.wait")

pytestmark = pytest.mark.debian("chromium")
HOSTILE = "<img src=x onerror=window.hacked=1>"
TOKEN = "admin-token-of-the-page-tests"


class Page:
    """The open page: waits for texts, reads and clicks."""

    def __init__(self, driver: Any, url: str):
        self.driver = driver
        driver.get(url)
        driver.get_log("browser")

    def text(self, id_: str) -> str:
        return str(self.driver.execute_script(f"return document.getElementById('{id_}').innerText"))

    def find(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def wait(self, id_: str, wanted: str) -> str:
        """The text of the part `id_` once `wanted` (a pattern) is in it."""
        waiting = waits.WebDriverWait(self.driver, 8, poll_frequency=0.05)
        waiting.until(lambda _: re.search(wanted, self.text(id_)), f"{wanted!r} in {id_}")
        return self.text(id_)


@pytest.fixture
def open_page(chromium: Any, service: Service) -> Iterator[Callable[[], Page]]:
    good = service.routes.read_text()
    yield lambda: Page(chromium, service.base)
    service.routes.write_text(good)
    chromium.get("about:blank")


def fail(service: Service, upstream: Upstream, model: str) -> None:
    """Let `model` fail until its circuit opens."""
    upstream.scripts[model] = error(503)
    for _ in range(3):
        service.chat()


def test_values_appear_and_change(open_page: Any, service: Service) -> None:
    service.chat("please refactor this python")
    page = open_page()
    before = page.wait("figures", r"Requests\s+\d+")

    service.chat("please refactor this python")

    done = int(re.search(r"Requests\s+(\d+)", before)[1]) + 1  # type: ignore[index]
    page.wait("figures", rf"Requests\s+{done}\b")
    assert "code" in page.text("categories")
    assert "refactor" in page.text("requests")


def test_failing_model_is_named_with_its_reason_and_reset_makes_it_usable(
    open_page: Any, service: Service, upstream: Upstream
) -> None:
    fail(service, upstream, "acme/one")
    page = open_page()
    page.wait(
        "troubles", r"acme/one failed with a server error \(status 503\)[\s\S]*next try in \d"
    )
    page.wait("models", r"acme/one\s+open: passed over")

    page.find("#troubles button[aria-label='Reset the circuit of acme/one']").click()

    page.wait("told", "acme/one: strikes forgotten")
    page.wait("models", r"acme/one\s+closed: in use")


def test_slow_model_is_named(open_page: Any, service: Service, upstream: Upstream) -> None:
    service.post("/config/category", {"name": "slow", "models": ["acme/snail"]})
    upstream.scripts["acme/snail"] = slow(1.05, whole("late"))
    for model in ["acme/one", "acme/snail"] * 2:
        service.chat(model=model)
    page = open_page()

    page.wait("troubles", r"acme/snail is slow: 1\.\d s to answer")


def test_broken_routes_file_is_told_with_its_reason_until_mended(
    open_page: Any, service: Service
) -> None:
    page = open_page()
    page.wait("state", "routes.json")
    good = service.routes.read_text()

    service.routes.write_text(good.replace('"routing_mode"', '"rooting_mode"'))

    page.wait("troubles", r"routes\.json is broken[\s\S]*rooting_mode[\s\S]*last good version")
    service.routes.write_text(good)
    page.wait("state", r"routes.json\s+good")


def test_dry_run_shows_the_words_that_decided(open_page: Any) -> None:
    page = open_page()

    page.find("#text").send_keys("please refactor this python")
    page.find("#try button").click()

    shown = page.wait("answer", "Category code")
    assert "refactor* 1" in shown
    assert "1. acme/one circuit closed" in shown


def test_hostile_words_stay_text(open_page: Any, service: Service) -> None:
    config = json.loads(service.routes.read_text())
    config["timeouts_sec"] = {HOSTILE: 1}
    service.routes.write_text(json.dumps(config))
    page = open_page()

    page.wait("troubles", re.escape(HOSTILE))

    assert page.driver.execute_script("return window.hacked") is None
    assert not page.driver.find_elements("css selector", "img")


def test_hostile_answers_of_the_router_stay_text(open_page: Any) -> None:
    page = open_page()
    page.wait("state", "routes.json")

    page.driver.execute_script(
        """const real = window.fetch;
        const spoil = value => typeof value === "string" ? value + arguments[0] : value;
        window.fetch = async (...args) => {
          const text = await (await real(...args)).text();
          return new Response(JSON.stringify(JSON.parse(text, (key, value) => spoil(value))));
        }; held.polls = 0;""",
        HOSTILE,
    )

    page.wait("state", re.escape(HOSTILE))
    page.wait("models", re.escape(HOSTILE))
    assert page.driver.execute_script("return window.hacked") is None
    assert not page.driver.find_elements("css selector", "img")


def test_nothing_comes_from_elsewhere_and_the_console_stays_clean(
    open_page: Any, service: Service
) -> None:
    page = open_page()
    page.wait("about", "updated")

    loaded = page.driver.execute_script(
        "return performance.getEntries().map(e => e.name).filter(n => n.includes(':'))"
    )

    assert [name for name in loaded if not name.startswith(service.base)] == []
    assert page.driver.get_log("browser") == []


def test_paused_page_asks_nothing(open_page: Any) -> None:
    page = open_page()
    page.wait("about", "updated")
    asked = "return performance.getEntriesByType('resource').length"

    page.find("#pause").click()
    page.driver.execute_script("performance.clearResourceTimings(); poll()")

    assert page.find("#pause").get_attribute("aria-pressed") == "true"
    assert page.driver.execute_script(asked) == 0


def test_narrow_page_does_not_scroll_sideways(open_page: Any) -> None:
    page = open_page()
    metrics = {"width": 380, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.wait("about", "updated")

    wide = page.driver.execute_script("return document.documentElement.scrollWidth")

    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= 380


@pytest.fixture
def locked(tmp_path: Path, upstream: Upstream) -> Iterator[Service]:
    service = Service(tmp_path, small_routes(upstream.url), ROUTER_ADMIN_TOKEN=TOKEN)
    yield service
    service.stop()


def test_key_is_asked_for_and_kept_for_this_tab(chromium: Any, locked: Service) -> None:
    page = Page(chromium, locked.base)
    page.wait("door", "A key is needed")

    page.find("#key").send_keys("not the key\n")
    page.wait("key-why", "This key does not open everything")
    page.find("#key").send_keys(TOKEN + "\n")
    page.wait("about", "updated")
    page.driver.refresh()
    page.wait("about", "updated")

    assert not page.find("#door").is_displayed()
    assert page.driver.execute_script("return localStorage.length") == 0
    chromium.get("about:blank")


def test_every_outcome_has_words() -> None:
    said = (ROOT / "dashboard.html").read_text().partition("const SAYS = {")[2].partition("};")[0]

    assert set(re.findall(r"(\w+): \"", said)) == {*VERDICTS, "success"}
