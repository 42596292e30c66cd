"""The failure drill ends as docs/failures.md promises, with every time shortened alike."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [("stream", "13 pass / 3 safe / 0 fail"), ("whole", "16 pass / 0 safe / 0 fail")],
)
def test_the_drill_ends_as_promised(mode, wanted):
    command = [sys.executable, "bench/drill.py", "--mode", mode, "--scale", "0.1"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert wanted in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0
