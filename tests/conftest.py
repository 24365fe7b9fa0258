"""Makes the helpers beside the tests importable, and prepares the processes in which tests run."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    """The process that only gives tests out to others starts them sooner for not importing torch."""
    if not config.getoption("numprocesses", None):
        config.pluginmanager.register(importlib.import_module("every"))
