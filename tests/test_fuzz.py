"""Files that were damaged, by accident or on purpose: each is refused by name, or read as what it holds."""

from __future__ import annotations

import copy
import functools
import io
import os
import random
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from rgap import Target, capture, losses
from rgap.reading import load_weights, read_pair, read_update, tensors
from rgap.update import Protocol, Sends

EACH = 25
"""Damaged files in one block."""
BLOCKS = 3
"""Blocks for each file that is damaged."""
LIMIT = 5.0
"""Seconds that one file may take."""
LARGEST = 2**24


class TooSlow(BaseException):
    """Not an Exception, so that nothing takes it for a damaged file."""


@contextmanager
def limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@functools.cache
def target() -> Target:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).eval()
    return Target(model, losses.Logistic(), (3,))


def as_npz(found: dict[str, Tensor], packed: bool = False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(file, **{name: t.numpy() for name, t in found.items()})
    return file.getvalue()


def as_pickle(found: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(found, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


class Bomb:
    """Leaves a directory behind when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trace),)


def files(folder: Path, trace: Path) -> dict[str, bytes]:
    """Whole files of every kind, updates and weights; and bombs, which leave the trace."""
    aim = target()
    update = capture(aim, torch.ones(1, 3), torch.tensor([1.0]))
    gradients = dict(update.gradients)
    weights = {name: t.detach().clone() for name, t in aim.model.state_dict().items()}
    update.save(folder / "own")
    bomb = {**gradients, "w": Bomb(trace)}
    return {
        "own": (folder / "own").read_bytes(),
        "safetensors": save(gradients),
        "safetensors weights": save(weights),
        "npz": as_npz(gradients),
        "npz packed": as_npz(weights, packed=True),
        "npz by order": as_npz({f"arr_{at}": t for at, t in enumerate(gradients.values())}),
        "pt": as_pickle(gradients),
        "pt weights": as_pickle({"epoch": 3, "state_dict": weights}),
        "old pt": as_pickle(gradients, zipped=False),
        "old pt weights": as_pickle({f"module.{name}": t for name, t in weights.items()}, zipped=False),
        "bomb": as_pickle(bomb),
        "old bomb": as_pickle(bomb, zipped=False),
    }


KINDS = [
    "own", "safetensors", "safetensors weights", "npz", "npz packed", "npz by order", "pt", "pt weights", "old pt",
    "old pt weights", "bomb", "old bomb",
]  # fmt: skip
ZIPPED = [kind for kind in KINDS if kind.startswith(("npz", "pt", "bomb"))]


# Damage.


def truncated(whole: bytes, rng: random.Random) -> bytes:
    return whole[: rng.randrange(len(whole))]


def flipped(whole: bytes, rng: random.Random) -> bytes:
    changed = bytearray(whole)
    for _ in range(rng.choice([1, 1, 1, 2, 8, 64])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def replaced(whole: bytes, rng: random.Random) -> bytes:
    changed = bytearray(whole)
    for _ in range(rng.choice([1, 2, 4])):
        changed[rng.randrange(len(changed))] = rng.choice([0, 1, 0x2E, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    return bytes(changed)


def swapped(whole: bytes, rng: random.Random) -> bytes:
    changed = bytearray(whole)
    for _ in range(rng.choice([1, 2, 16])):
        one, other = rng.randrange(len(changed)), rng.randrange(len(changed))
        changed[one], changed[other] = changed[other], changed[one]
    return bytes(changed)


def duplicated(whole: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(whole))
    block, at = whole[start : start + rng.randint(1, 200)], rng.randrange(len(whole))
    return whole[:at] + block + whole[at:]


def inserted(whole: bytes, rng: random.Random) -> bytes:
    at = rng.choice([0, 8, len(whole), rng.randrange(len(whole))])
    return whole[:at] + rng.choice([rng.randbytes(rng.randint(1, 64)), bytes(rng.randint(1, 64))]) + whole[at:]


def cut(whole: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(whole))
    return whole[:at] + whole[at + rng.randint(1, 64) :]


def absurd(whole: bytes, rng: random.Random) -> bytes:
    """A length, a size or an offset far beyond what is there."""
    width = rng.choice([1, 2, 4, 8])
    size = rng.choice([2 ** (8 * width) - 1, 2 ** (8 * width - 1), 2 ** (8 * width - 1) - 1, 0])
    at = rng.choice([0, rng.randrange(len(whole)), max(len(whole) - rng.randint(1, 64), 0)])
    return whole[:at] + size.to_bytes(width, "little") + whole[at + width :]


def absurd_digits(whole: bytes, rng: random.Random) -> bytes:
    """The same for numbers that are written out."""
    places = [at for at, byte in enumerate(whole) if chr(byte).isdecimal()] or [0]
    at = rng.choice(places)
    return whole[:at] + rng.choice([b"99999999999", b"-1", b"1e9", b"0", b"18446744073709551615"]) + whole[at + 1 :]


def noise(whole: bytes, rng: random.Random) -> bytes:
    keep = rng.choice([0, 8, 16, len(whole) // 2])
    return whole[:keep] + rng.randbytes(rng.randint(0, 300))


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    truncated, flipped, replaced, swapped, duplicated, inserted, cut, absurd, absurd_digits, noise,
]  # fmt: skip


def within(whole: bytes, damage: Callable[[bytes, random.Random], bytes], rng: random.Random) -> bytes:
    """Damage to one member of a zip file, which then has the right checksum."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(file, "w") as changed:
        names = archive.namelist()
        # A pickle is where the harm is.
        chosen = next((name for name in names if name.endswith("data.pkl") and rng.random() < 0.8), rng.choice(names))
        for name in names:
            content = archive.read(name)
            changed.writestr(name, damage(content, rng) if name == chosen and content else content)
    return file.getvalue()


# What is asked of each.


def refusal(read: Callable[[], object], path: Path) -> str | None:
    """Why the file is refused, if it is; the refusal names the file."""
    why = None
    with limited():
        try:
            read()
        except ValueError as error:
            why = str(error)
    if why is not None:
        assert str(path) in why
        assert len(why) < 10_000
    return why


def check(path: Path) -> tuple[dict[str, Tensor] | None, str | None]:
    """Read a file in every way; gives the tensors in it, or why it is refused."""
    aim, model = target(), copy.deepcopy(target().model)
    state = target().model.state_dict()
    found: dict[str, Tensor] = {}
    why = refusal(lambda: found.update(tensors(path, LARGEST)), path)

    def update() -> None:
        made = read_update(path, aim, partial=True, largest=LARGEST)
        assert made.gradients
        assert all(t.shape == aim.parameters[name].shape for name, t in made.gradients.items())
        assert all(t.isfinite().all() for t in made.gradients.values())

    def weights() -> None:
        try:
            load_weights(model, path, LARGEST)
        except ValueError:
            assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
            raise

    refusals = [refusal(update, path), refusal(weights, path)]
    protocol = Protocol(Sends.DIFFERENCE, learning_rate=0.1)
    refusals.append(refusal(lambda: read_pair(path, path, aim, protocol, largest=LARGEST), path))
    assert why is None or all(refusals)
    return (found if why is None else None), why


def seeded(*of: object) -> random.Random:
    return random.Random(repr(of))


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is there once content of a file was executed."""
    return tmp_path_factory.mktemp("trace") / "ran"


@pytest.fixture(scope="module")
def whole(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files(tmp_path_factory.mktemp("whole"), trace)


@pytest.fixture(autouse=True)
def _nothing_is_executed(trace: Path) -> Iterator[None]:
    yield
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["bomb", "old bomb"])
def test_the_bombs_are_live(kind: str, whole: dict[str, bytes], trace: Path) -> None:
    torch.load(io.BytesIO(whole[kind]), weights_only=False)
    trace.rmdir()


def test_whole_files_are_read(whole: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "file"
    for kind in KINDS:
        path.write_bytes(whole[kind])
        found, why = check(path)
        assert (found is None) == ("bomb" in kind), (kind, why)


@pytest.mark.search
@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file(kind: str, block: int, first_seed: int, whole: dict[str, bytes], tmp_path: Path) -> None:
    path, rng = tmp_path / "file", seeded(kind, first_seed + block)
    path.write_bytes(whole[kind])
    right = None if "bomb" in kind else tensors(path)
    for at in range(EACH):
        damage = DAMAGES[at % len(DAMAGES)]
        damaged = damage(whole[kind], rng)
        path.write_bytes(damaged)
        found, _ = check(path)
        assert found is None or damage is not truncated
        if found is not None and kind in ZIPPED and damaged != whole[kind]:
            # What has a checksum is read as it was, or not at all.
            assert right is not None
            assert all(torch.equal(t, right[name]) for name, t in found.items()), (at, damage, len(found))


@pytest.mark.search
@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("kind", ZIPPED)
def test_a_damaged_member_of_a_zip_file(
    kind: str, block: int, first_seed: int, whole: dict[str, bytes], tmp_path: Path
) -> None:
    path, rng = tmp_path / "file", seeded("within", kind, first_seed + block)
    for at in range(EACH):
        path.write_bytes(within(whole[kind], DAMAGES[at % len(DAMAGES)], rng))
        check(path)


@pytest.mark.search
@pytest.mark.parametrize("block", range(BLOCKS))
def test_noise(block: int, first_seed: int, tmp_path: Path) -> None:
    path, rng = tmp_path / "file", seeded("noise", first_seed + block)
    starts = [b"", b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x10\0\0\0\0\0\0\0{", b"\x93NUMPY"]
    for at in range(EACH):
        path.write_bytes(starts[at % len(starts)] + rng.randbytes(rng.choice([0, 1, 9, 100, 5000])))
        assert check(path)[0] is None
