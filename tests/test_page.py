"""The page in a real Chromium, before a real gunicorn and a scripted upstream."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from formats import FORMATS
from helpers import wait_until
from service import ROOT, Service, free_port, small_routes
from upstream import Upstream, error, hang, slow, whole

from parts.judge import VERDICTS

waits = pytest.importorskip("selenium.webdriver.support.wait")
chains = pytest.importorskip("selenium.webdriver.common.action_chains")
keys = pytest.importorskip("selenium.webdriver.common.keys")
conditions = pytest.importorskip("selenium.webdriver.support.expected_conditions")

pytestmark = pytest.mark.debian("chromium")
HOSTILE = "<img src=x onerror=window.hacked=1>"
VALUE = r"^\d\d:\d\d:\d\d: [\d.]+ m?s, acme/\w+ (answered|failed)"
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

    def answers(self, path: str, **changes: Any) -> None:
        """From now on the router's answer at `path` holds `changes`."""
        self.driver.execute_script(
            """const real = window.fetch, [wanted, changes] = arguments;
            window.fetch = async (path, ...more) => {
              const reply = await real(path, ...more);
              if (path !== wanted) return reply;
              return new Response(JSON.stringify({...await reply.json(), ...changes}));
            };""",
            path,
            changes,
        )

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


def screen(wide: int) -> dict[str, Any]:
    return {"width": wide, "height": 900, "deviceScaleFactor": 1, "mobile": wide < 500}


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


def test_kinds_of_failures_are_told_in_words(
    open_page: Any, service: Service, upstream: Upstream
) -> None:
    upstream.scripts["acme/one"] = hang
    service.chat(stream=True).close()
    page = open_page()

    shown = page.wait("models", r"\d × sent no token in time")

    assert "first_token" not in shown


@pytest.mark.parametrize("wide", [1200, 380])
def test_share_bars_begin_at_the_same_place_in_every_row(
    open_page: Any, service: Service, wide: int
) -> None:
    service.post("/config/category", {"name": "a-category-of-a-long-name", "models": ["acme/one"]})
    service.chat("please refactor this python")
    service.chat("hello")
    page = open_page()
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen(wide))
    page.wait("categories", "a-category-of-a-long-name")

    begins, lengths = page.driver.execute_script(
        """const boxes = [...document.querySelectorAll("#categories .track")]
          .map(track => track.getBoundingClientRect());
        return [boxes.map(box => box.left), boxes.map(box => box.width)];"""
    )

    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert len(begins) >= 5
    assert len(set(begins)) == len(set(lengths)) == 1


def test_each_category_shows_its_chain_and_the_circuits_in_words(
    open_page: Any, service: Service, upstream: Upstream
) -> None:
    fail(service, upstream, "acme/one")
    page = open_page()

    shown = page.wait("categories", "open")

    assert re.search(r"code\s+1\. acme/one open\s+2\. acme/two closed", shown)
    assert re.search(r"conversation\s+1\. acme/one open\s+2\. acme/two closed", shown)


def test_rejected_request_does_not_read_like_a_failed_model(
    open_page: Any, service: Service
) -> None:
    service.post("/v1/chat/completions", {"messages": "no"})
    page = open_page()
    page.wait("requests", "rejected")

    newest = page.find("#requests li").text

    assert re.search(r"rejected\s+status 422", newest)
    assert "No model was asked: something in it does not fit" in newest
    assert not re.search(r"none|unknown|failed|\$", newest)


def test_another_format_than_chat_is_named_and_what_was_cached(
    chromium: Any, serve: Callable[..., Service], upstream: Upstream
) -> None:
    local = {"base_url": upstream.url, "api_key_env": "TEST_API_KEY", "speaks": ["messages"]}
    service, form = serve(upstreams={"local": local}), FORMATS["messages"]
    upstream.default = form.good()
    service.post(form.path, form.ask())

    page = Page(chromium, service.base)

    page.wait("requests", "as Messages")
    page.wait("models", "40 % of input cached")


def test_latency_line_has_a_scale(open_page: Any, service: Service) -> None:
    service.chat()
    page = open_page()

    shown = page.wait("latency", r"\n0 m?s")

    assert re.search(r"^(\d[\d.]* (m?s)\n)+0 \2\n\d\d:\d\d:\d\d", shown)


def test_values_of_the_latency_line_are_read_by_pointer_and_by_keys(
    open_page: Any, service: Service
) -> None:
    for _ in range(3):
        service.chat()
    page = open_page()
    page.wait("read-off", r"\d requests: fastest \d+ ms, median")
    slider = page.find("#latency input")

    chains.ActionChains(page.driver).move_to_element(page.find("#latency .field")).perform()
    page.wait("read-off", VALUE)
    page.driver.execute_script("arguments[0].focus()", slider)
    slider.send_keys(keys.Keys.HOME, keys.Keys.ARROW_RIGHT)

    assert slider.get_property("value") == "1"
    assert re.search(VALUE, slider.get_attribute("aria-valuetext"))
    assert page.text("read-off") == slider.get_attribute("aria-valuetext")


def test_value_that_is_being_read_stays_when_another_request_ends(
    open_page: Any, service: Service
) -> None:
    service.chat()
    page = open_page()
    page.wait("latency", "0 m?s")
    slider = page.find("#latency input")
    page.driver.execute_script("arguments[0].focus()", slider)
    being_read = page.wait("read-off", VALUE)

    service.chat()
    waits.WebDriverWait(page.driver, 8).until(conditions.staleness_of(slider))

    assert page.driver.execute_script("return document.activeElement.dataset.key") == "latency"
    assert page.text("read-off") == being_read


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


@pytest.fixture
def hybrid(tmp_path: Path, upstream: Upstream) -> Iterator[Service]:
    """A router whose Ollama is not there."""
    routes = small_routes(upstream.url, routing_mode="hybrid")
    service = Service(
        tmp_path, {**routes, "ollama": {"base_url": f"http://127.0.0.1:{free_port()}"}}
    )
    yield service
    service.stop()


def test_absent_ollama_is_a_hint_with_its_two_ways_out(chromium: Any, hybrid: Service) -> None:
    hybrid.chat("a text without any keyword")
    page = Page(chromium, hybrid.base)

    shown = page.wait("troubles", "Hint")

    assert "ollama pull qwen2.5:0.5b" in shown
    assert '"routing_mode": "keywords" in routes.json' in shown
    assert "Nothing: all circuits are closed" in page.text("summary")
    assert page.find("#attention").get_attribute("class") == ""
    assert chromium.title == "llm-router"
    chromium.get("about:blank")


def test_hint_about_a_missing_model_is_the_router_s_own_sentence(open_page: Any) -> None:
    page = open_page()
    message = "Ollama has no phi3: run `ollama pull phi3`"

    page.answers(
        "health", classifier={"status": "failing", "reason": "no_model", "message": message}
    )

    shown = page.wait("troubles", r"Hint\s+Ollama lacks its model: keywords decide")
    assert shown.count("ollama pull phi3") == shown.count("ollama pull") == 1
    assert '"routing_mode": "keywords" in routes.json' in shown


@pytest.mark.parametrize(
    ("message", "told"),
    [(None, "Ollama did not answer in time"), ("Ollama is too slow", "Ollama is too slow")],
)
def test_classifier_that_is_there_and_fails_needs_attention(
    open_page: Any, message: str | None, told: str
) -> None:
    page = open_page()

    page.answers(
        "health", classifier={"status": "failing", "reason": "classify", "message": message}
    )

    page.wait("troubles", rf"Classifier\s+{told}\s+[\s\S]*Keywords decide meanwhile")
    assert page.find("#attention").get_attribute("class") == "warn"


def test_message_about_an_upstream_is_shown(open_page: Any) -> None:
    page = open_page()
    message = "TEST_API_KEY is refused by local"
    state = {"configured": True, "key_refused_since": "2026-11-25T20:00:00Z", "message": message}

    page.answers("health", upstreams={"local": state})

    page.wait("troubles", rf"Key refused\s+{message}\s+Since ")
    page.wait("state", rf"Upstream local\s+key refused {message}")


def test_base_url_and_model_are_copied_by_pointer_and_by_keys(
    open_page: Any, service: Service
) -> None:
    page = open_page()

    page.find("[aria-label='Copy the base URL']").click()
    page.wait("copied", rf"{service.base}/v1 is copied")
    page.find("#text").send_keys(keys.Keys.CONTROL, "v")
    page.find("[aria-label='Copy the model']").send_keys(keys.Keys.ENTER)
    page.wait("copied", "router is copied")
    page.find("#text").send_keys(keys.Keys.NULL, " ", keys.Keys.CONTROL, "v")

    assert page.find("#text").get_property("value") == f"{service.base}/v1 router"


def test_where_a_page_may_not_copy_it_selects(open_page: Any, service: Service) -> None:
    page = open_page()
    page.driver.execute_script("document.execCommand = () => false")

    page.find("[aria-label='Copy the base URL']").click()

    page.wait("copied", r"is selected: copy it with Ctrl\+C")
    selected = page.driver.execute_script("return String(getSelection())")
    assert selected == f"{service.base}/v1"


def test_dry_run_shows_the_words_that_decided(open_page: Any) -> None:
    page = open_page()

    page.find("#text").send_keys("please refactor this python")
    page.find("#try button").click()

    shown = page.wait("answer", "Category code")
    assert "refactor* 3" in shown
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
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen(380))
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
    assert not page.find("#attention").is_displayed()
    page.find("#key").send_keys(TOKEN + "\n")
    page.wait("about", "updated")
    page.driver.refresh()
    page.wait("about", "updated")

    assert not page.find("#door").is_displayed()
    assert page.driver.execute_script("return localStorage.length") == 0
    chromium.get("about:blank")


@pytest.fixture(scope="module")
def spent(serve: Callable[..., Service], shared_upstream: Upstream) -> Service:
    """A service that has been asked, in two categories."""
    shared_upstream.reset()  # the test before, in whatever order, may have left failures there
    found = serve()
    for text in ("please refactor this python", "hello", "hello"):
        found.chat(text)
    wait_until(lambda: found.get("/metrics").json()["today"]["success"] == 3)
    return found


def test_cost_and_requests_by_day_are_read_by_keys(chromium: Any, spent: Service) -> None:
    page = Page(chromium, spent.base)
    page.wait("spent", r"^\$0\.00015 in 30 days, most on ")

    page.find("[data-what=requests]").click()
    page.find("[data-days='7']").click()
    page.wait("spent", r"^3 in 7 days")
    page.find("#spending input").send_keys(keys.Keys.ARROW_RIGHT)

    told = page.wait("spent", r"^\d{4}-\d\d-\d\d: 3 \(code 1, conversation 2\)$")
    assert page.find("#spending input").get_attribute("aria-valuetext") == told
    assert len(page.driver.find_elements("css selector", "#spending path")) == 2
    assert re.findall(r"code|conversation", page.text("spending")) == ["code", "conversation"]


def test_the_history_is_filtered_by_model_and_outcome(chromium: Any, spent: Service) -> None:
    page = Page(chromium, spent.base)
    page.wait("kept-says", "The last 3 requests")
    assert "code by keywords" in page.text("kept-rows")

    page.driver.execute_script(
        """const box = document.getElementById("by-outcome");
        box.value = "failed"; box.dispatchEvent(new Event("change"));"""
    )

    page.wait("kept-says", "No such request")


def test_an_answer_that_comes_after_a_newer_question_is_not_shown(
    chromium: Any, spent: Service
) -> None:
    page = Page(chromium, spent.base)
    page.wait("kept-says", "The last 3 requests")

    page.driver.execute_script(
        """const real = window.fetch, box = document.getElementById("by-outcome");
        window.fetch = async (path, ...more) => {
          const reply = await real(path, ...more);
          if (path.includes("outcome=failed")) await new Promise(go => window.release = go);
          return reply;
        };
        for (const value of ["failed", "success"]) {
          box.value = value; box.dispatchEvent(new Event("change"));
        }"""
    )
    page.wait("kept-says", "The last 3 requests")
    waits.WebDriverWait(page.driver, 8).until(
        lambda driver: driver.execute_script("return window.release && (release(), true)")
    )
    page.driver.execute_async_script("setTimeout(arguments[0], 100)")

    assert "The last 3 requests" in page.text("kept-says")


def test_every_outcome_has_words() -> None:
    said = (
        (ROOT / "parts/dashboard.html")
        .read_text()
        .partition("const SAYS = {")[2]
        .partition("};")[0]
    )

    assert set(re.findall(r"(\w+): \"", said)) == {*VERDICTS, "success"}
