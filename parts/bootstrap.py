"""Before anything is imported: which Python has the packages. Only the standard library."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

PYTHON = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "python"


def use_environment() -> None:
    """Go on with the virtual environment's Python if this one lacks the packages, or say how."""
    if sys.version_info >= (3, 11) and find_spec("flask") and find_spec("gunicorn"):
        return
    if PYTHON.exists() and Path(sys.prefix).resolve() != PYTHON.parent.parent:
        os.execv(PYTHON, [str(PYTHON), *sys.argv])
    sys.exit("router: the packages are not installed yet; run: make install")
