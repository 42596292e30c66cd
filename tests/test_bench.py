"""The speed bench runs and counts; what it measures is nobody's test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.debian("wrk")
@pytest.mark.debian("nginx")
def test_a_short_run_measures_all_that_is_here_without_an_error(tmp_path: Path):
    found = tmp_path / "figures.json"
    command = [sys.executable, ROOT / "bench" / "speed.py", "--only", "small,million"]
    done = subprocess.run(
        [*command, "--quick", "--json", found], capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(found.read_text())["figures"]
    assert {"direct", "nginx", "constant", "router"} <= set(figures["small"])
    assert sum(row["bad"] for row in figures["small"].values()) == 0
    assert figures["small"]["router"]["rate"] > 1
    assert figures["million"]["router"]["served"] >= 3_000
    assert "machine: " in done.stdout
