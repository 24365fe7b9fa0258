"""What every test runs in: a plugin of pytest, by which every run of the tests draws the same examples.

Whatever is drawn hangs on the name of the test alone: not on the machine, the order, the number of workers, what failed
before, or what else was imported. With --hypothesis-seed=N, which `make explore` sets, other examples are drawn.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import zlib
from collections.abc import Generator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import shapes
import torch
import tracing
from hypothesis import HealthCheck, Phase, register_random, settings
from hypothesis.internal.conjecture import providers
from PIL import Image, PngImagePlugin

gc.disable()  # what is imported stays

shapes.thin_out()
tracing.follow_once()
# What is compiled is kept, whatever the environment says: each worker reads every test, and many tests start processes.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# A test kills programs, not the machine: nobody waits until what was written is on the disk.
os.fsync = lambda file: None


def save_quickly(image: Image.Image, *where: Any) -> None:
    """A PNG of the same pixels, pressed less, which takes half of the time that a picture takes."""
    image.encoderinfo.setdefault("compress_level", 1)
    PngImagePlugin._save(image, *where)


Image.register_save("PNG", save_quickly)

# No check hangs on the clock: neither a deadline nor the one for slow drawing.
STILL = {"database": None, "deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, max_examples=25, **STILL)
# Examples that are written down are not drawn; when one fails, nothing else would be.
settings.register_profile("explore", derandomize=False, phases=[Phase.generate, Phase.shrink], **STILL)
settings.load_profile("same")
# Hypothesis also draws constants that it finds in the source of every module imported so far, and so of other tests.
providers._get_local_constants = providers.Constants


class TorchRandom:
    """torch's own generator, as Hypothesis seeds and restores generators around each example."""

    def seed(self, number: int) -> None:
        torch.default_generator.manual_seed(number)

    def getstate(self) -> torch.Tensor:
        return torch.default_generator.get_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.default_generator.set_state(state)


TORCH = TorchRandom()
register_random(TORCH)


def seed_all(name: str, config: pytest.Config) -> None:
    """Seed every global generator from a name, and look at shapes as in the first test."""
    shapes.calls.clear()
    number = zlib.crc32(f"{name} {config.option.hypothesis_seed}".encode())
    random.seed(number)
    np.random.seed(number)
    TORCH.seed(number)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    seed_all(collector.nodeid, collector.config)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Whichever test happens to be the first to ask for it."""
    seed_all(f"{fixturedef.baseid} {fixturedef.argname} {getattr(request, 'param_index', 0)}", request.config)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    seed_all(item.nodeid, item.config)
    return (yield)


@pytest.fixture
def first_seed(request: pytest.FixtureRequest) -> int:
    """Where a search over seeds begins: at 0, or elsewhere in each round of `make explore`."""
    return int(request.config.option.hypothesis_seed or 0)


def pytest_collection_finish() -> None:
    """What all tests share is not looked through for garbage again and again, and what they make is less often."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()
    if "PYTEST_XDIST_WORKER" in os.environ:  # all tests
        import_module("warm").begin()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a CUDA device runs where there is one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device here"))


def pytest_configure(config: pytest.Config) -> None:
    if config.option.hypothesis_seed is not None:
        settings.load_profile("explore")
    # Flower imports typer, which with the newest click asks for names that will go.
    config.addinivalue_line("filterwarnings", "ignore:'click.utils.get_:DeprecationWarning")


@pytest.fixture
def two_threads() -> Generator[None]:
    """torch has two threads, however many the tests run on."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
