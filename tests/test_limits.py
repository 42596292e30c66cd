"""Who may spend how much: limits by day and month, category and client, and each client's key."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import settings_for
from helpers import figures
from service import KEY, small_routes
from upstream import plain, whole

import router as module
from parts import clients
from parts.errors import RoutesError
from parts.settings import SettingsError
from parts.table import load_table

COST = 0.00005  # of one answer of the scripted upstream, in USD
OWN, ADMIN = "own-key-" + "o" * 12, "admin-token-" + "t" * 12
KEYS = {"laptop": "laptop-key-" + "l" * 12, "phone": "phone-key-" + "p" * 12}


def categories(**changes: dict[str, Any]) -> dict[str, Any]:
    """The small routes' categories, and `cheap`, with changes."""
    found = small_routes("http://127.0.0.1:1/v1")["categories"]
    found["cheap"] = {"models": ["acme/two"]}
    return {name: category | changes.get(name, {}) for name, category in found.items()}


def limit(spans: float) -> dict[str, float]:
    return {"daily_limit_usd": spans * COST}


# --- limits --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["daily_limit_usd", "monthly_limit_usd"])
def test_a_spent_limit_is_a_429_until_its_end(build, key):
    client = build(**{key: 0.5 * COST})

    statuses = [client.chat().status_code for _ in range(2)]

    error = client.chat()
    assert statuses == [200, 429]
    assert error.json["error"]["code"] == "budget_exhausted"
    assert key in error.json["error"]["message"]
    until = time.gmtime(time.time() + int(error.headers["Retry-After"]))
    assert until[3:5] == (0, 0)
    assert key.startswith("daily") or until.tm_mday == 1


def test_a_category_s_limit_holds_for_that_category_alone(build):
    client = build(categories=categories(code=limit(0.5)))

    statuses = [client.chat(text).status_code for text in ("python", "python", "hello")]

    assert statuses == [200, 429, 200]
    assert "category code" in client.chat("python").json["error"]["message"]


def test_what_a_limit_would_refuse_goes_to_the_category_of_on_limit(build, upstream):
    client = build(categories=categories(), on_limit="cheap", **limit(0.5))
    client.chat("python")

    answer = client.chat("python")

    assert answer.status_code == 200
    assert answer.headers["X-Router-Category"] == "cheap"
    assert answer.headers["X-Router-Mode"] == "limit"
    assert "else code by keywords" in answer.headers["X-Router-Reason"]
    assert upstream.requests[-1].body["model"] == "acme/two"
    assert client.post("/route", {"text": "python"}).json["category"] == "cheap"


def test_the_category_of_on_limit_that_is_spent_too_is_a_429(build):
    client = build(categories=categories(cheap=limit(0.5)), on_limit="cheap", **limit(0.5))

    statuses = [client.chat("python").status_code for _ in range(3)]

    assert statuses == [200, 200, 429]
    assert "category cheap" in client.chat("python").json["error"]["message"]


def test_who_asks_for_one_model_gets_that_one_or_a_429(build):
    client = build(categories=categories(), on_limit="cheap", **limit(0.5))
    client.chat()

    assert client.chat(model="acme/one").status_code == 429


def test_the_limit_is_asked_of_every_category_s_chain_not_of_the_model(build):
    client = build(categories=categories(code=limit(0.5)))
    client.chat("python")

    assert client.chat("hello").status_code == 200


@pytest.mark.parametrize(
    ("members", "said"),
    [({"on_limit": "chep"}, "$.on_limit: is neither `refuse` nor in $.categories; did you mean"),
     ({"compare_with": "acme/thre"}, "$.compare_with: is not in $.models"),
     ({"clients": {"Laptop": {}}}, "$.clients: the name 'Laptop'"),
     ({"clients": {"laptop": {"daily": 1}}}, "$.clients.laptop: unknown key 'daily'"),
     ({"monthly_limit_usd": 0}, "$.monthly_limit_usd: should be more than 0"),
     ({"history_days": 0}, "$.history_days: should be at least 1")],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_its_place(members, said):
    with pytest.raises(RoutesError) as e:
        load_table(json.dumps(small_routes("http://127.0.0.1:1/v1", categories=categories())
                              | members))  # fmt: skip

    assert said in str(e.value)


def test_80_percent_and_all_of_a_limit_are_one_line_each(build, lines, monkeypatch):
    monkeypatch.setattr("parts.history.BATCH_S", 0.01)
    client = build(**limit(5))
    for _ in range(7):
        client.chat()
        client.router.history._tell_limits()

    told = [line.split("event=")[1].split()[0] for line in lines if "usd=0.00025 " in line]

    assert told == ["limit_near", "limit_spent"]


# --- each client's key -----------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "clients"
    path.write_text("# mine\n" + "".join(f"{name}: {key}\n" for name, key in KEYS.items()))
    return path


@pytest.fixture
def two(build, file, clock):
    """A router with two clients, a key of its own and an admin token."""
    return build(clock, ROUTER_CLIENTS_FILE=str(file), ROUTER_API_KEY=OWN, ROUTER_ADMIN_TOKEN=ADMIN,
                 clients={"laptop": limit(0.5)})  # fmt: skip


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_each_key_is_a_name_in_figures_and_limits(two):
    keys = [KEYS["laptop"], KEYS["laptop"], KEYS["phone"], OWN, "wrong", ""]

    statuses = [two.chat(headers=bearer(key)).status_code for key in keys]

    rows = two.get("/usage?by=client", headers=bearer(OWN)).json["rows"]
    assert statuses == [200, 429, 200, 200, 401, 401]
    assert {row["client"]: (row["success"], row["rejected"]) for row in rows} == {
        "laptop": (1, 1), "phone": (1, 0), "default": (1, 0)}  # fmt: skip
    recent = two.get("/usage/requests", headers=bearer(OWN)).json["requests"]
    assert [row["client"] for row in recent] == ["default", "phone", "laptop", "laptop"]


@pytest.mark.parametrize(
    ("path", "wanted"),
    [("/v1/models", [200, 200, 401]), ("/v1/catalog", [200, 200, 401]),
     ("/v1/usage", [200, 200, 401]), ("/usage", [401, 200, 200]), ("/metrics", [401, 200, 200]),
     ("/usage/requests", [401, 200, 200]), ("/config", [401, 200, 200])],
)  # fmt: skip
def test_a_client_s_key_opens_its_own_routes_and_no_other(two, path, wanted):
    keys = (KEYS["phone"], OWN, ADMIN)

    assert [two.get(path, headers=bearer(key)).status_code for key in keys] == wanted


def test_a_client_reads_its_own_share_alone(two):
    two.chat(headers=bearer(KEYS["phone"]))
    two.chat(headers=bearer(KEYS["phone"]))
    two.chat(headers=bearer(KEYS["laptop"]))

    phone, laptop, own = (two.get("/v1/usage", headers=bearer(key)).json
                          for key in (KEYS["phone"], KEYS["laptop"], OWN))  # fmt: skip

    counts = [found["usage"]["summary"]["requestCount"] for found in (phone, laptop, own)]
    assert counts == [2, 1, 3]
    assert [found["client"] for found in (phone, laptop, own)] == ["phone", "laptop", "default"]
    assert phone["budget"]["configured"] is False
    assert laptop["budget"] | {"windowKey": ""} == {
        "configured": True, "windowKey": "", "limitMicros": 25, "spentMicros": 50,
        "remainingMicros": 0}  # fmt: skip


def test_a_change_of_the_file_is_in_force_and_a_bad_one_is_not(two, file, clock):
    file.write_text(f"laptop: {KEYS['phone']}\n")
    clock += 1
    assert two.chat(headers=bearer(KEYS["laptop"])).status_code == 401

    file.write_text("laptop\n")
    clock += 1

    assert two.chat(headers=bearer(KEYS["phone"])).status_code == 200
    health = two.get("/health").json["clients"]
    assert (health["status"], health["count"]) == ("stale", 1)
    assert health["error"].startswith("line 1: expected `name: key`")


@pytest.mark.parametrize(
    ("text", "said"),
    [("laptop key", "line 1: expected"), ("Laptop: kkkkkkkkkkkk", "line 1: expected"),
     ("a: kkkkkkkk\na: llllllll", "line 2: the name a is taken"),
     ("default: kkkkkkkk", "line 1: the name default is taken"),
     ("a: kkkkkkkk\nb: kkkkkkkk", "line 2: this key is another's already"),
     (f"a: {OWN}", "line 1: this key is another's already"),
     ("a: 'kkkkkkkk'", "line 1: the quotes"), ("a: <key>", "line 1: holds no key")],
)  # fmt: skip
def test_a_file_that_cannot_be_meant_stops_the_start_without_its_keys(tmp_path, text, said):
    path = tmp_path / "clients"
    path.write_text(text)

    with pytest.raises(SettingsError) as e:
        clients.Clients(path, (OWN,))

    assert said in str(e.value)
    assert "kkkk" not in str(e.value)


def test_keys_that_others_may_read_are_a_doubt(file):
    settings = settings_for(file, ROUTER_CLIENTS_FILE=str(file), ROUTER_API_KEY=OWN)
    file.chmod(0o640)
    assert any("chmod 600" in doubt for doubt in settings.doubts)

    file.chmod(0o600)

    assert not any("chmod 600" in doubt for doubt in settings.doubts)


def test_a_missing_file_stops_the_start(build, tmp_path):
    with pytest.raises(SettingsError, match="ROUTER_CLIENTS_FILE"):
        build(ROUTER_CLIENTS_FILE=str(tmp_path / "none"), ROUTER_API_KEY=OWN)


def test_a_clients_file_alone_would_show_all_to_each_of_them(build, file):
    with pytest.raises(SettingsError, match="set ROUTER_API_KEY or ROUTER_ADMIN_TOKEN, too"):
        build(ROUTER_CLIENTS_FILE=str(file))


def test_with_an_admin_token_only_clients_chat_and_nobody_else(build, file):
    client = build(ROUTER_CLIENTS_FILE=str(file), ROUTER_ADMIN_TOKEN=ADMIN)

    keys = (KEYS["phone"], ADMIN, "")

    assert [client.chat(headers=bearer(key)).status_code for key in keys] == [200, 401, 401]


def test_no_key_is_in_the_log_or_an_answer(two, lines):
    for key in (*KEYS.values(), "wrong-key-" + "w" * 12):
        two.chat(headers=bearer(key))
    shown = [two.get(path, headers=bearer(OWN)).text
             for path in ("/metrics", "/config", "/usage", "/usage/requests")]  # fmt: skip

    said = "\n".join([*lines, *shown])

    assert [key for key in (*KEYS.values(), "wwww", OWN, ADMIN, KEY) if key in said] == []


# --- what it would have cost -------------------------------------------------------------------


def test_saved_is_the_other_model_s_price_less_what_was_spent(build):
    client = build(compare_with="acme/two")

    client.chat()

    assert figures(client)["today"]["saved_usd"] == pytest.approx(9 * COST)  # ten times the price


def test_cached_tokens_count_as_cached(build, upstream):
    models = {"acme/one": {"cost": {"input": 1, "output": 2, "cached_input": 0.5}},
              "acme/two": {"cost": {"input": 10, "output": 20, "cached_input": 1}}}  # fmt: skip
    client = build(compare_with="two", models=models)
    usage = {"prompt_tokens": 1000, "completion_tokens": 10,
             "prompt_tokens_details": {"cached_tokens": 600}}  # fmt: skip
    upstream.default = whole("hello", usage=usage)

    client.chat()

    other, own = 400 * 10 + 600 * 1 + 10 * 20, 400 * 1 + 600 * 0.5 + 10 * 2
    assert figures(client)["today"]["saved_usd"] == pytest.approx((other - own) / 1e6)


@pytest.mark.parametrize("models", [{}, {"acme/one": {"cost": {"input": 1, "output": 2}}}])
def test_nothing_is_invented_where_a_price_is_unknown(build, models):
    client = build(compare_with="acme/two", models=models)

    client.chat()

    assert "saved_usd" not in figures(client)["today"]


# --- as others read it -------------------------------------------------------------------------


def test_models_say_context_price_and_abilities_as_openrouter_does(build):
    models = {"acme/one": {"cost": {"input": 1, "output": 3.2, "cached_input": 0.1},
                           "context": 200_000, "images": False},
              "acme/two": {"context": 128_000}}  # fmt: skip
    client = build(models=models)

    found = {entry["id"]: entry for entry in client.get("/v1/models").json["data"]}

    price = found["acme/one"]["pricing"]
    assert list(price.values()) == ["0.000001", "0.0000032", "0.0000001"]
    assert list(price) == ["prompt", "completion", "input_cache_read"]
    assert found["acme/one"]["context_length"] == 200_000
    assert found["acme/one"]["architecture"]["input_modalities"] == ["text"]
    assert found["router"]["context_length"] == found["router/code"]["context_length"] == 128_000
    assert "pricing" not in found["router"]
    assert found["acme/two"]["architecture"]["input_modalities"] == ["text", "image"]


def test_a_context_that_is_not_known_is_not_told(client):
    assert "context_length" not in client.get("/v1/models/router").json


def test_the_catalog_has_what_openclaw_s_plugin_reads(build):
    client = build(models={"acme/one": {"cost": {"input": 1, "output": 3.2}, "context": 64_000},
                           "acme/two": {"context": 32_000}})  # fmt: skip

    [provider] = client.get("/v1/catalog").json["providers"]

    models = {model["id"]: model for model in provider["models"]}
    assert provider["openaiCompatible"] is True
    assert models["acme/one"]["pricing"] == {"inputMicrosPerMillion": 1_000_000,
        "outputMicrosPerMillion": 3_200_000, "maxInputTokens": 64_000}  # fmt: skip
    assert models["router"]["pricing"] == {"maxInputTokens": 32_000}
    assert "llm.chat" in models["router"]["capabilities"]


def test_the_budget_is_the_month_s_and_its_key_ends_in_the_month(build):
    client = build(monthly_limit_usd=1, daily_limit_usd=0.5)
    client.chat()

    budget = client.get("/v1/usage").json["budget"]

    assert budget["configured"] is True
    assert budget["windowKey"].endswith(time.strftime("/%Y-%m", time.gmtime()))
    assert (budget["limitMicros"], budget["spentMicros"]) == (1_000_000, 50)
    assert budget["remainingMicros"] == 999_950


# --- /usage and the terminal -------------------------------------------------------------------


@pytest.fixture
def used(build):
    client = build(compare_with="acme/two")
    for text in ("hello", "hello", "please refactor this python"):
        client.chat(text)
    client.chat(model="acme/two")
    return client


@pytest.mark.parametrize(
    ("by", "wanted"),
    [("category", {("code",): 1, ("conversation",): 2, ("explicit",): 1}),
     ("model", {("acme/one",): 3, ("acme/two",): 1}), ("client", {("default",): 4}),
     ("model,category", {("acme/one", "code"): 1, ("acme/one", "conversation"): 2,
                         ("acme/two", "explicit"): 1})],
)  # fmt: skip
def test_usage_is_grouped_as_wanted_before_and_after_it_is_written(used, by, wanted):
    def found() -> dict[tuple[str, ...], int]:
        rows = used.get(f"/usage?by={by}").json["rows"]
        return {tuple(row[name] for name in by.split(",")): row["requests"] for row in rows}

    before = found()
    used.router.history.close()

    assert before == found() == wanted


def test_usage_as_csv_has_a_head_and_no_formula(used):
    used.router.history.add(last_call(used, category="=1+1"))

    answer = used.get("/usage?by=category&format=csv")

    head, *rows = answer.text.splitlines()
    assert answer.mimetype == "text/csv"
    assert head.startswith("category,requests,success,failed")
    assert [row.split(",")[0] for row in rows] == ["'=1+1", "code", "conversation", "explicit"]


def last_call(client: Any, **changes: Any) -> Any:
    """A request that ended well, with changes."""
    call = client.router.begin(None)
    call.outcome, call.mode = "success", "keywords"
    for name, value in changes.items():
        setattr(call, name, value)
    return call


@pytest.mark.parametrize(
    "query", ["by=hour", "by=day,day", "by=", "days=0", "days=x", "days=99999999999999999"]
)
def test_a_query_that_cannot_be_meant_is_a_422_with_its_name(client, query):
    answer = client.get(f"/usage?{query}")

    assert answer.status_code == 422
    assert answer.json["detail"][0]["loc"] == ["query", query.partition("=")[0]]


def test_kept_requests_are_found_by_model_and_outcome_and_paged(used):
    used.router.history.close()

    def ids(query: str) -> list[str]:
        return [row["model"] for row in used.get(f"/usage/requests?{query}").json["requests"]]

    assert ids("") == ["acme/two", "acme/one", "acme/one", "acme/one"]
    assert ids("model=acme/one&outcome=success&limit=2") == ["acme/one"] * 2
    assert ids("outcome=failed") == []
    assert ids("before=2") == ["acme/one"]


@pytest.fixture
def terminal(used, capsys, monkeypatch, routes):
    """Runs a command on the history of `used`."""
    used.router.history.close()
    monkeypatch.setenv("ROUTER_ROUTES", str(routes))
    capsys.readouterr()

    def run(*args: str) -> tuple[int, str, str]:
        status = module.main(module.explain_here, [*args])
        return (status, *capsys.readouterr())

    return run


def test_costs_are_a_table_with_a_total(terminal):
    status, out, _ = terminal("costs", "--by", "category")

    lines = [line.split() for line in out.splitlines()]
    assert status == 0
    assert lines[0][:2] == ["category", "requests"]
    assert [line[0] for line in lines[1:]] == ["code", "conversation", "explicit", "all"]
    assert lines[-1][1:] == ["4", "0", "40", "80", "$0.0006", "$0.0014"]


@pytest.mark.parametrize("form", ["--json", "--csv"])
def test_costs_for_programs_hold_the_same(terminal, form):
    _, out, _ = terminal("costs", "--by", "model", form)

    if form == "--json":
        rows = {row["model"]: str(row["requests"]) for row in json.loads(out)}
    else:
        rows = dict(line.split(",")[:2] for line in out.splitlines()[1:])
    assert rows == {"acme/one": "3", "acme/two": "1"}


def test_requests_are_lines_oldest_first(terminal):
    status, out, _ = terminal("requests", "-n", "2")

    first, second = out.splitlines()
    assert status == 0
    assert "code by keywords: acme/one, default" in first
    assert "explicit by explicit: acme/two, default" in second


@pytest.mark.parametrize(
    ("args", "said"),
    [(["costs", "--by", "hour"], "--by: expected some of day"),
     (["requests"], "there is no history yet")],
)  # fmt: skip
def test_what_the_commands_cannot_do_is_a_sentence(terminal, monkeypatch, tmp_path, args, said):
    if args == ["requests"]:
        monkeypatch.setenv("ROUTER_HISTORY", str(tmp_path / "none.db"))

    status, _, err = terminal(*args)

    assert status == 1
    assert said in err


def test_a_spent_limit_sends_no_vectors_to_another_model(build, upstream):
    local = {"base_url": upstream.url, "api_key_env": "TEST_API_KEY", "speaks": ["embeddings"]}
    usage = {"prompt_tokens": 20, "total_tokens": 20}
    vectors = {"data": [{"index": 0, "embedding": [1.0]}], "usage": usage}
    upstream.default = plain(200, json.dumps(vectors).encode())
    client = build(upstreams={"local": local}, on_limit="cheap",
                   categories=categories(code=limit(0.5)))  # fmt: skip

    statuses = [client.post("/v1/embeddings", {"model": "router/code", "input": "a"}).status_code
                for _ in range(3)]  # fmt: skip

    assert statuses[-1] == 429
    assert set(upstream.models_asked()) == {"acme/one"}


def test_a_dry_run_is_of_the_client_that_asks(build, routes):
    file = routes.parent / "clients"
    file.write_text("".join(f"{name}: {key}\n" for name, key in KEYS.items()))
    file.chmod(0o600)
    client = build(ROUTER_API_KEY=OWN, ROUTER_CLIENTS_FILE=str(file), on_limit="cheap",
                   clients={"laptop": limit(0.5)}, categories=categories())  # fmt: skip
    key = {"Authorization": f"Bearer {KEYS['laptop']}"}
    client.chat("python", headers=key)

    dry = client.post("/route", {"text": "python"}, headers=key).json
    answer = client.chat("python", headers=key)

    assert (dry["category"], dry["mode"]) == ("cheap", "limit")
    assert answer.headers["X-Router-Category"] == "cheap"
