"""README and docs/ are tested: they name what there is, commands work, links lead somewhere."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, Service

import router as module
from parts.settings import NAMES
from parts.table import load_table

README = ROOT / "README.md"
PAGES = {str(page.relative_to(ROOT)): page.read_text()
         for page in (README, *sorted((ROOT / "docs").glob("*.md")))}  # fmt: skip
TEXT = "\n".join(PAGES.values())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    routes = json.loads((ROOT / "routes.json").read_text())
    service = Service(folder, {**routes, "routing_mode": "keywords"}, ROUTER_DEMO="1")
    yield service
    service.stop()


@pytest.mark.debian("curl")
@pytest.mark.parametrize("line", re.findall(r"^ *(curl .*)$", TEXT, re.M))
def test_each_curl_works_in_demo_mode(demo, line):
    for address in ("http://127.0.0.1:3456", "https://$NAME"):
        line = line.replace(address, demo.base)

    done = subprocess.run(
        [*shlex.split(line), "-s", "--fail"], capture_output=True, check=True, timeout=20
    )

    assert json.loads(done.stdout)


def test_the_printed_answer_is_the_demo_answer(demo):
    printed = json.loads(re.search(r'```json\n(\{"id": "gen-demo".*?)\n```', TEXT, re.S)[1])

    answer = demo.chat("Write a Python function that reverses a string").json()

    assert answer["choices"] == printed["choices"]
    assert answer["model"] == printed["model"]


def test_the_printed_routes_file_is_one():
    [printed] = re.findall(r'```json\n(\{\s+"routing_mode".*?)```', TEXT, re.S)

    table = load_table(printed)

    assert set(table.categories) == {"code", "conversation"}


def test_each_route_is_named(demo):
    app = module.create_app(module.Settings(routes=demo.routes))

    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:path:)?\w+>", "<", rule.rule).split("<")[0].rstrip("/") or "/"
        assert path in TEXT, rule.rule


def test_each_setting_is_named():
    names = {name for name in NAMES if not name.endswith("_FILE")}

    assert len(names) >= len(dataclasses.fields(module.Settings)) - 2
    assert {name for name in names if f"`{name}`" not in TEXT} == set()


def test_each_make_target_is_named():
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)

    assert [name for name in targets if f"make {name}" not in TEXT] == []


def test_each_error_status_and_outcome_header_is_named():
    source = "".join(path.read_text() for path in [ROOT / "router.py", *ROOT.glob("parts/*.py")])
    statuses = set(re.findall(r"RouterError\(\s*(\d{3})", source))
    headers = set(re.findall(r'"(X-Router-[\w-]+)"', (ROOT / "router.py").read_text()))

    assert {s for s in statuses - {"499", "502"} if s not in TEXT} == set()
    assert {h for h in headers if h not in TEXT} == set()


def test_the_readme_is_read_to_its_end_and_leads_to_each_other_page():
    assert len(README.read_text().splitlines()) <= 280
    assert {page for page in PAGES if f"]({page}" not in PAGES["README.md"]} == {"README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_no_page_counts_tests(page):
    assert re.findall(r"(?i)\d\S* (?:\w+ )?tests\b", PAGES[page]) == []


def anchors(page: Path) -> set[str]:
    """The anchors of the headings in `page`, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: str) -> list[str]:
    """The links of `page` that stay in the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    return [link for link in found if not link.startswith(("http://", "https://"))]


@pytest.mark.parametrize(("page", "link"), [(page, link) for page in PAGES for link in links(page)])
def test_each_link_leads_somewhere(page, link):
    file, _, anchor = link.partition("#")
    target = (ROOT / page).parent / file if file else ROOT / page

    assert target.exists()
    assert not anchor or anchor in anchors(target)


# The lines for a server find these programs only; the second kind just notes that it was called.
REAL = "basename cat cp install ln mkdir sed sh tee"
NOTED = "apt certbot curl make nginx pip systemctl useradd"


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """A folder that stands for a fresh server, with `bin` for its programs."""
    called = f'echo "$(basename "$0") $*" >> {tmp_path}/called\n'
    programs = dict.fromkeys(NOTED.split(), called) | {
        "sudo": 'exec "$@"\n',
        "git": f'{called}mkdir -p "$3/.venv/bin" && cp -r {ROOT}/deploy "$3"\n'
               f'cp {tmp_path}/bin/pip "$3/.venv/bin"\n',
        "openssl": "echo 0123456789abcdef\n",
    }  # fmt: skip
    for folder in ("bin", "opt", "etc/systemd/system", "etc/nginx/sites-available",
                   "etc/nginx/sites-enabled"):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True)
    for name in REAL.split():
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    for name, script in programs.items():
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n" + script)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def type_in(server: Path, blocks: list[str]) -> None:
    """Type `blocks` on `server` as they stand, with a name of one's own."""
    lines = "\n".join(blocks).replace("NAME=router.example.com", "NAME=chat.example.net")
    lines = re.sub(r"(?<=[\s=])/(etc|opt)/", rf"{server}/\1/", lines)
    done = subprocess.run(["/bin/sh", "-eu", "-c", lines], input="sk-or-mine\n", cwd=server,
                          env={"PATH": f"{server}/bin"}, text=True, capture_output=True,
                          timeout=20)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def lines_for_a_server(page: str) -> list[str]:
    here, *_ = PAGES[page].partition("## From your own machine")
    return re.findall(r"^```bash\n(.*?)^```", here, re.M | re.S)


def test_the_lines_for_a_server_can_be_typed_as_they_stand(server):
    type_in(server, lines_for_a_server("docs/vps.md"))

    keys = server / "etc" / "llm-router"
    site = (server / "etc/nginx/sites-enabled/llm-router").read_text()
    assert (keys / "openrouter_api_key").read_text() == "sk-or-mine\n"
    assert {path.stat().st_mode & 0o777 for path in keys.glob("*_*")} == {0o600}
    assert len(list(keys.glob("*_*"))) == 3
    assert (keys / "env").read_text() == "ROUTER_ALLOWED_HOSTS=chat.example.net\n"
    assert "server_name chat.example.net;" in site
    assert "router.example.com" not in site
    assert "certbot --nginx -d chat.example.net" in (server / "called").read_text()


def test_the_lines_for_a_second_instance_can_be_typed_as_they_stand(server):
    type_in(server, lines_for_a_server("docs/vps.md") + lines_for_a_server("docs/instances.md"))

    first, second = ((server / f"etc/systemd/system/{name}.service").read_text()
                     for name in ("llm-router", "llm-router-2"))  # fmt: skip
    site = (server / "etc/nginx/sites-available/llm-router").read_text()
    gone, new = (
        set(a.splitlines()) - set(b.splitlines()) for a, b in [(first, second), (second, first)]
    )
    assert {line.partition("=")[0] for line in gone} == {
        "StateDirectory", "Environment", "CPUAffinity", "ExecStartPre"}  # fmt: skip
    assert {"StateDirectory=llm-router-2", "CPUAffinity=1"} < new
    assert re.search(
        r"\n    zone .*\n    least_conn;\n    server \S+3457;\n    server \S+3456;", site
    )
    assert "ROUTER_REDIS_URL=" in (server / "etc/llm-router/env").read_text()
    assert (server / "etc/llm-router/env-2").read_text() == "ROUTER_BIND=127.0.0.1:3457\n"
