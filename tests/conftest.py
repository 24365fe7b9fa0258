"""Makes the helpers beside the tests importable, and sets how examples are drawn."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

# A shared check must not depend on the luck of the draw; at a developer's desk every run draws others.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a CUDA device runs where there is one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device here"))


def pytest_configure(config: pytest.Config) -> None:
    # Flower imports typer, which with the newest click asks for names that will go.
    config.addinivalue_line("filterwarnings", "ignore:'click.utils.get_:DeprecationWarning")
