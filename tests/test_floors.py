"""The house: a part imports only parts of lower floors, and none of them router.py."""

from __future__ import annotations

import ast

import pytest
from conftest import ROOT

FLOORS = (  # what stands on a floor knows what stands below, and nothing beside it
    "addresses bootstrap demo errors jsontext logs loops lru prompts vocabulary",
    # cluster is asked by livefile and by router.py, and is handed both: neither imports the other
    "chat cluster errortext flights livefile notify settings table turns worker",
    "classifier clients exchange history metrics quotas",
    "carrier events judge ledger live",
    "command dialects",
    "access relay",
    "keepalive views",
)
FLOOR = {name: n for n, names in enumerate(FLOORS) for name in names.split()}
PARTS = sorted(path.stem for path in ROOT.glob("parts/*.py") if path.stem != "__init__")


def imported(name: str) -> set[str]:
    """What the part imports of ours, anywhere in it: functions and TYPE_CHECKING count."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / "parts" / f"{name}.py").read_text())):
        names = [alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)]
        if isinstance(node, ast.Import):
            found |= set(names)
        elif isinstance(node, ast.ImportFrom):
            found |= (
                {f"{node.module}.{n}" for n in names} if node.module == "parts" else {node.module}
            )
    return {n.removeprefix("parts.").partition(".")[0] for n in found
            if n and n.partition(".")[0] in ("parts", "router", "wsgi")}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_a_part_stands_only_on_lower_floors(name):
    assert {other for other in imported(name) if FLOOR.get(other, 99) >= FLOOR[name]} == set()


def test_router_can_be_read_in_one_sitting():
    assert len((ROOT / "router.py").read_text().splitlines()) <= 1600
