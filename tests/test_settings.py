"""Settings: what cannot be meant stops the start by its name, what can is used as meant."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Service, free_port, small_routes
from helpers import wait_until

from parts.settings import Settings, SettingsError, absolute_paths, read_dotenv, read_secret

KEY = "sk-or-v1-0123456789abcdef"


@pytest.fixture
def dotenv(tmp_path, monkeypatch):
    """Reads a `.env` of these bytes into an environment of its own; the key it gives."""

    def read(data: bytes, **environ: str) -> str:
        monkeypatch.setattr(os, "environ", dict(environ))
        (tmp_path / ".env").write_bytes(data)
        read_dotenv(tmp_path / ".env")
        return read_secret(os.environ, "SOME_KEY")

    return read


def refusal(**environ: str) -> str:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(environ)
    return str(caught.value)


# --- .env ----


@pytest.mark.parametrize(
    "data",
    [
        f"SOME_KEY={KEY}", f"SOME_KEY={KEY}\r\n", f"SOME_KEY = {KEY} ", f"export SOME_KEY={KEY}",
        f"export\tSOME_KEY='{KEY}'", f'SOME_KEY="{KEY}"   # mine', f"SOME_KEY={KEY} # mine",
        f"\ufeffSOME_KEY={KEY}", f"# mine\n\n  SOME_KEY={KEY}", f"SOME_KEY=\nSOME_KEY={KEY}",
        f"SOME_KEY={KEY}\nSOME_KEY=\n", f"SOME_KEY=old\nSOME_KEY={KEY}",
         f"OTHER=a=b\nSOME_KEY={KEY}",
    ],
)  # fmt: skip
def test_a_dotenv_is_read_as_people_write_it(dotenv, data):
    assert dotenv(data.encode()) == KEY


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "latin-1"])
def test_a_dotenv_is_read_as_editors_save_it(dotenv, encoding):
    bom = "\ufeff" if encoding == "utf-16-be" else ""

    assert dotenv(f"{bom}# clé\nSOME_KEY={KEY}\n".encode(encoding)) == KEY


def test_a_number_sign_inside_a_value_is_part_of_it(dotenv):
    assert dotenv(b"SOME_KEY=abc#def") == "abc#def"
    assert dotenv(b"SOME_KEY='abc # def' # mine\nSOME_KEY=x#y") == "x#y"


@pytest.mark.parametrize("there", ["", "  "])
def test_an_empty_variable_does_not_hide_the_line_of_dotenv(dotenv, there):
    assert dotenv(f"SOME_KEY={KEY}".encode(), SOME_KEY=there) == KEY
    assert dotenv(f"SOME_KEY={KEY}".encode(), SOME_KEY="mine") == "mine"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (KEY, "line 2: expected NAME=value"), (f"SOME_KEY: {KEY}", "write SOME_KEY=..."),
        ("SOME_KEY", "expected NAME=value"), (f"SOME-KEY={KEY}", "expected NAME=value"),
        (f"set SOME_KEY={KEY}", "expected NAME=value"),
        (f'SOME_KEY="{KEY}', "a quote is not closed"),
        (f"SOME_KEY='{KEY}' {KEY}", "a quote is not closed"),
        (f"SOME_KEY=$HOME/{KEY}", "not replaced"),
        (f'SOME_KEY="${{A}}{KEY}"', "not replaced"), (f"SOME_KEY=`cat {KEY}`", "not replaced"),
        (f"SOME_KEY={KEY}\x00", "control character"), ("{", "expected NAME=value"),
    ],
)  # fmt: skip
def test_a_line_that_is_none_stops_the_start_without_its_value(dotenv, line, said):
    with pytest.raises(SettingsError) as caught:
        dotenv(f"# mine\n{line}\n".encode())

    assert said in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_dotenv_that_cannot_be_read_stops_the_start(tmp_path):
    (tmp_path / ".env").mkdir()

    with pytest.raises(SettingsError, match=r"\.env cannot be read: Is a directory"):
        read_dotenv(tmp_path / ".env")


def test_a_missing_dotenv_is_fine(tmp_path):
    assert read_dotenv(tmp_path / ".env") == []


def test_half_a_utf_16_file_stops_the_start(dotenv):
    with pytest.raises(SettingsError, match="damaged UTF-16"):
        dotenv(f"SOME_KEY={KEY}".encode("utf-16")[:-1])


# --- keys ----


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (f"Bearer {KEY}", "without the word Bearer"), (f"{KEY} {KEY}", "no blanks"),
        (f"{KEY}\n{KEY}", "no blanks"), (f'"{KEY}"', "quotes"), (f"'{KEY}", "quotes"),
        ("sk-or-...", "in an example"), ("<your key>", "no blanks"), ("<key>", "in an example"),
        (f"ROUTER_API_KEY={KEY}", "in an example"), (f"{KEY}é", "printable ASCII"),
    ],
)  # fmt: skip
def test_a_key_that_cannot_be_one_is_refused_without_its_value(value, said):
    assert refusal(ROUTER_API_KEY=value).startswith("ROUTER_API_KEY: ")
    assert said in refusal(ROUTER_API_KEY=value)
    assert KEY not in refusal(ROUTER_API_KEY=value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_key_file_is_read_as_editors_save_it(tmp_path, encoding):
    (tmp_path / "key").write_bytes(f"{KEY}\r\n".encode(encoding))

    assert read_secret({"A_FILE": str(tmp_path / "key")}, "A") == KEY


# --- values that parse but cannot be meant ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ROUTER_BIND", "3456"), ("ROUTER_BIND", ":3456"), ("ROUTER_BIND", "127.0.0.1"),
        ("ROUTER_BIND", "127.0.0.1:"), ("ROUTER_BIND", "127.0.0.1:99999"),
        ("ROUTER_BIND", "::1:80"),
        ("ROUTER_BIND", "127.0.0.1:80,127.0.0.1:81"), ("ROUTER_BIND", "http://127.0.0.1:80"),
        ("ROUTER_BIND", "127.0.0.1:٣"), ("ROUTER_THREADS", "0"), ("ROUTER_THREADS", "5000"),
        ("ROUTER_THREADS", "8.0"), ("ROUTER_THREADS", "-1"), ("ROUTER_THREADS", "٣"),
        ("ROUTER_MAX_BODY_MB", "16M"), ("ROUTER_LOG_FORMAT", "xml"), ("ROUTER_DEMO", "true"),
        ("ROUTER_ALLOW_OPEN", "yes"), ("ROUTER_INSTANCE", "a\x1bb"), ("ROUTER_INSTANCE", "x" * 101),
        ("ROUTER_REDIS_URL", "localhost:6379"), ("ROUTER_REDIS_URL", "redis://h:port/0"),
        ("ROUTER_ROUTES", "~nobody-of-this-name/routes.json"),
        ("ROUTER_ALLOWED_HOSTS", "*"), ("ROUTER_ALLOWED_HOSTS", "a..b"),
        ("ROUTER_ALLOWED_HOSTS", "https://a.example/path"), ("ROUTER_ALLOWED_HOSTS", "*.10.0.0.1"),
        ("ROUTER_ALLOWED_HOSTS", "a.example/x"), ("ROUTER_ALLOWED_ORIGINS", "*"),
        ("ROUTER_ALLOWED_ORIGINS", "null"), ("ROUTER_ALLOWED_ORIGINS", "localhost:3000"),
        ("ROUTER_ALLOWED_ORIGINS", "http://*.example.com"),
        ("ROUTER_ALLOWED_ORIGINS", "http://a/b"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_meant_stops_the_start_by_its_name(name, value):
    assert refusal(**{name: value}).startswith(f"{name}: ")


def test_a_bundle_without_certificates_is_refused(tmp_path):
    (tmp_path / "bundle").write_text("no certificate")

    assert "holds no certificates" in refusal(REQUESTS_CA_BUNDLE=str(tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("value", "bind"),
    [(" 127.0.0.1:3456 ", "127.0.0.1:3456"), ("LocalHost:80", "localhost:80"),
    ("[::1]:80", "[::1]:80"),
     ("127.0.0.1:0080", "127.0.0.1:80")],
)  # fmt: skip
def test_a_bind_is_used_as_it_was_checked(value, bind):
    assert Settings.from_env({"ROUTER_BIND": value}).bind == bind


@pytest.mark.parametrize(
    "name", ["ROUTER_THREAD", "ROUTER_ALOWED_HOSTS", "ROUTER_API_KEYS", "ROUTER_APIKEY"]
)
def test_a_setting_that_nobody_reads_is_told_with_the_nearest_one(name):
    (doubt,) = Settings.from_env({name: "x"}).doubts

    assert doubt.startswith(f"{name} is no setting of the router; did you mean 'ROUTER_")


@pytest.mark.parametrize("path", ["/nowhere/log", "/proc", "/"])
def test_a_log_that_cannot_be_written_is_a_doubt_and_no_error(path):
    (doubt,) = Settings.from_env({"ROUTER_VALIDATION_LOG": path}).doubts

    assert doubt.startswith("ROUTER_VALIDATION_LOG: ")


# --- paths ----


def test_paths_of_the_environment_count_from_where_the_command_was_typed():
    environ = {"ROUTER_ROUTES": "mine.json", "A_KEY_FILE": "key", "ROUTER_API_KEY_FILE": "/k"}

    absolute_paths(environ, Path("/here"))

    assert environ == {"ROUTER_ROUTES": "/here/mine.json", "A_KEY_FILE": "/here/key",
                       "ROUTER_API_KEY_FILE": "/k"}  # fmt: skip


def test_paths_of_dotenv_count_from_its_folder(dotenv, tmp_path):
    dotenv(b"ROUTER_ROUTES=mine.json\nSOME_KEY=k")

    assert os.environ["ROUTER_ROUTES"] == str(tmp_path / "mine.json")


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")

    assert Settings.from_env({"ROUTER_ROUTES": "~/r.json"}).routes == Path("/home/me/r.json")


def test_serve_reads_the_files_that_were_meant_from_another_folder(tmp_path):
    (tmp_path / "routes.json").write_text(
        __import__("json").dumps(small_routes("http://127.0.0.1:1/v1"))
    )
    (tmp_path / "key.txt").write_text("k" * 20)
    port = free_port()
    env = {**os.environ, "ROUTER_ROUTES": "routes.json", "ROUTER_API_KEY_FILE": "key.txt",
           "ROUTER_BIND": f"127.0.0.1:{port}", "TEST_API_KEY": "k"}  # fmt: skip
    command = [sys.executable, str(ROOT / "router.py"), "serve"]
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=file)

    try:
        wait_until(lambda: f"routes={tmp_path}/routes.json" in log.read_text(), 20)
    finally:
        process.terminate()
        process.wait(20)


# --- hosts ----


@pytest.mark.parametrize(
    ("setting", "host", "status"),
    [
        ("router.example.com", "router.example.com:8443", 200),
        ("router.example.com:8443", "ROUTER.example.com", 200),
        ("https://router.example.com/", "router.example.com", 200),
        ("router.example.com.", "router.example.com", 200),
        ("router.example.com", "router.example.com.", 200),
        ("*.example.com", "a.router.example.com", 200), ("*.example.com", "example.com", 403),
        (".example.com", "router.example.com", 200), (".example.com", "example.com", 200),
        ("*.example.com", "badexample.com", 403), ("a.example b.example", "b.example", 200),
        ("bücher.example", "xn--bcher-kva.example", 200),
        ("example.com", "router.example.com", 403),
        ("router.example.com", "router.example.com@evil", 403), ("router.example.com", "", 403),
    ],
)  # fmt: skip
def test_allowed_hosts_are_taken_as_people_write_them(routes, setting, host, status):
    from conftest import LocalClient, settings_for

    import router

    app = router.create_app(settings_for(routes, ROUTER_ALLOWED_HOSTS=setting))

    assert LocalClient(app).get("/health", headers={"Host": host}).status_code == status


# --- proxies ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1080"), ("https_proxy", "socks5h://127.0.0.1:1080"),
        ("HTTPS_PROXY", "http://127.0.0.1:99999"), ("HTTPS_PROXY", "htp://127.0.0.1:1"),
    ],
)  # fmt: skip
def test_a_proxy_that_no_request_can_use_stops_the_start_by_its_name(tmp_path, name, value):
    done = check(tmp_path, "https://api.example.com/v1", **{name: value})

    assert done.returncode == 1
    assert name in done.stderr


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1", "https://free.example.com/v1"])
def test_a_proxy_that_no_upstream_uses_is_left_alone(tmp_path, url):
    proxies = {"ALL_PROXY": "socks5://127.0.0.1:1080", "NO_PROXY": "free.example.com"}

    assert check(tmp_path, url, **proxies).returncode == 0


def check(folder: Path, url: str, **env: str) -> subprocess.CompletedProcess[str]:
    import json

    (folder / "routes.json").write_text(json.dumps(small_routes(url)))
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return subprocess.run(
        [sys.executable, str(ROOT / "router.py"), "check"], cwd=folder, text=True, timeout=30,
        env={**clean, "ROUTER_ROUTES": "routes.json", **env}, capture_output=True,
    )  # fmt: skip


# --- the service ----


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"ROUTER_THREADS": "many"}, "ROUTER_THREADS: expected a whole number"),
        ({"ROUTER_GUNICORN_LOGLEVEL": "loud"}, "ROUTER_GUNICORN_LOGLEVEL: expected"),
        ({"ROUTER_PIN_CPU": "2"}, "ROUTER_PIN_CPU: expected"),
    ],
)
def test_gunicorns_own_settings_stop_the_start_by_their_names(tmp_path, env, said):
    with pytest.raises(AssertionError, match=said):
        Service(tmp_path, small_routes("http://127.0.0.1:1/v1"), **env)


def test_a_missing_routes_file_is_named_at_the_start(tmp_path):
    with pytest.raises(AssertionError, match=r"/nowhere\.json: cannot be read"):
        Service(tmp_path, None, ROUTER_ROUTES="/nowhere.json")
