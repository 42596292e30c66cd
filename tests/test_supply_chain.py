"""What is installed: no version with a published hole, no surprise major, and hashes on demand."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

# Below these there are published security fixes.
SAFE = {"flask": "3.1.3", "werkzeug": "3.1.5", "gunicorn": "26", "requests": "2.33",
        "urllib3": "2.7"}  # fmt: skip


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def bounds(requirement: Requirement) -> dict[str, Version]:
    return {part.operator: Version(part.version) for part in requirement.specifier}


@pytest.mark.parametrize("requirement", requirements("requirements.txt"), ids=lambda r: r.name)
def test_each_package_has_a_floor_and_ends_before_a_major_that_nobody_tried(requirement):
    found = bounds(requirement)

    assert set(found) == {">=", "<"}
    assert found[">="] >= Version(SAFE.get(requirement.name, "0"))
    assert found["<"].release == (found["<"].major,)
    assert found["<"].major <= Version(version(requirement.name)).major + 1


def test_the_packages_with_known_holes_are_all_held():
    assert set(SAFE) <= {requirement.name for requirement in requirements("requirements.txt")}


@pytest.mark.parametrize("name", ["requirements.txt", "tests/requirements.txt"])
def test_what_is_installed_fits(name):
    wrong = [r.name for r in requirements(name) if version(r.name) not in r.specifier]

    assert wrong == []


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("*.py"), *ROOT.glob("parts/*.py")]), ids=lambda path: path.name
)
def test_the_service_imports_nothing_that_is_not_listed(path):
    ours = {"parts"} | {other.stem for other in ROOT.glob("*.py")}
    listed = {r.name.replace("-", "_") for r in requirements("requirements.txt")}
    listed |= (
        {"redis"} if path.name in ("cluster.py", "settings.py") else set()
    )  # imported only on demand
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])

    assert found - set(sys.stdlib_module_names) - ours - listed == set()


def test_install_takes_only_what_the_lock_names(tmp_path):
    for name in ("Makefile", "requirements.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    plan = ["make", "-n", "install", "PYTHON=python3"]
    before = subprocess.run(plan, cwd=tmp_path, capture_output=True, check=True, text=True).stdout
    (tmp_path / "requirements.lock").write_text("")
    after = subprocess.run(plan, cwd=tmp_path, capture_output=True, check=True, text=True).stdout

    assert re.search(r"pip install --quiet -r requirements\.txt", before)
    assert re.search(r"pip install --quiet --require-hashes -r requirements\.lock", after)
