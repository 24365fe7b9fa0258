"""Files of others: every format is read bit for bit, names are matched, and what does not fit is refused, never run."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from warm import Program, python

from rgap import Target, Update, UpdateError, capture, losses
from rgap.checks import preflight
from rgap.protocol import Optimiser, Protocol, Sends
from rgap.reading import HeaderWins, Matched, load_weights, matched, read_pair, read_update, tensors
from rgap.update import Header

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NAMES = ["0.weight", "0.bias", "3.weight", "3.bias"]
DIFFERENCE = Protocol(Sends.DIFFERENCE, learning_rate=0.1)


def small_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Three shapes alike: order and prefixes could mix them up.
        return (
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Linear(4, 4)).to(dtype).eval()
        )


def small_target(model: nn.Module | None = None) -> Target:
    return Target(small_model() if model is None else model, losses.CrossEntropy(4), (4,))


TARGET = small_target()
GRADIENTS = dict(capture(TARGET, torch.ones(1, 4), torch.tensor([1.0])).gradients)
WEIGHTS = {name: t.clone() for name, t in TARGET.model.state_dict().items()}
BUFFERS = ("1.running_mean", "1.running_var", "1.num_batches_tracked")


def as_safetensors(found: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: t.contiguous() for name, t in found.items()}, path)


def as_npz(found: Mapping[str, Tensor], path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{name: t.numpy() for name, t in found.items()})


def as_packed_npz(found: Mapping[str, Tensor], path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **{name: t.numpy() for name, t in found.items()})


def as_pt(found: object, path: Path) -> None:
    torch.save(found, path)


def as_old_pt(found: object, path: Path) -> None:
    torch.save(found, path, _use_new_zipfile_serialization=False)


WRITERS = {
    "safetensors": as_safetensors, "npz": as_npz, "packed npz": as_packed_npz, "pt": as_pt, "old pt": as_old_pt,
}  # fmt: skip
every_format = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(
        found[name].dtype is t.dtype and found[name].shape == t.shape and bits(found[name]) == bits(t)
        for name, t in expected.items()
    )


def refused(message: str, of: Callable[[], object]) -> None:
    with pytest.raises(UpdateError, match=re.escape(message)):
        of()


# Files to tensors.


shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def named(draw: st.DrawFn, dtypes: list[torch.dtype]) -> dict[str, Tensor]:
    names = draw(
        st.lists(
            st.text("ab.0_é", min_size=1, max_size=6).filter(lambda n: n.strip("./")),
            min_size=1,
            max_size=4,
            unique=True,
        )
    )
    found = {}
    for name in names:
        shape, dtype = draw(shapes), draw(st.sampled_from(dtypes))
        # Any bits at all, NaN included.
        size = int(np.prod(shape)) * dtype.itemsize
        raw = torch.frombuffer(bytearray(draw(st.binary(min_size=size, max_size=size)) + bytes(8)), dtype=torch.uint8)
        found[name] = raw[:size].clone().view(dtype).reshape(shape)
    return found


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_format_keeps_every_bit(kind: str, data: st.DataObject) -> None:
    others = [torch.int64, torch.uint8]
    known = DTYPES if "npz" not in kind else [t for t in DTYPES if t is not torch.bfloat16]
    found = data.draw(named([*known, *others]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        WRITERS[kind](found, path)
        assert same(tensors(path), found)


@every_format
def test_the_name_of_the_file_does_not_count(write: Callable[..., None], tmp_path: Path) -> None:
    for name in ("u.npz", "u.pt", "u.pth", "u.bin", "u.ckpt", "u"):
        write(GRADIENTS, tmp_path / name)
        assert same(tensors(tmp_path / name), GRADIENTS)
        assert same(tensors(str(tmp_path / name)), GRADIENTS)


@every_format
def test_only_torch_insists_on_a_name(write: Callable[..., None], tmp_path: Path) -> None:
    """torch.load takes what is called .safetensors for nothing else."""
    write(GRADIENTS, path := tmp_path / "u.safetensors")
    if write is as_pt:
        refused(f"{path}: got a torch.save file of another name, expected .pt; rename it", lambda: tensors(path))
    else:
        assert same(tensors(path), GRADIENTS)


@every_format
def test_what_was_read_does_not_hang_on_the_file(write: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "u"
    write(GRADIENTS, path)
    found = tensors(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert same(found, GRADIENTS)


@pytest.mark.parametrize("write", [as_npz, as_pt, as_old_pt])
def test_order_is_the_files(write: Callable[..., None], tmp_path: Path) -> None:
    found = {name: torch.ones(1) for name in ("c", "a", "b")}
    write(found, tmp_path / "u")
    assert list(tensors(tmp_path / "u")) == ["c", "a", "b"]


def test_arrays_of_any_layout_are_read(tmp_path: Path) -> None:
    path = tmp_path / "u.npz"
    table = np.arange(6.0).reshape(2, 3)
    np.savez(path, big=table.astype(">f4"), fortran=np.asfortranarray(table), scalar=np.float32(3))
    found = tensors(path)
    assert torch.equal(found["big"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(found["fortran"], torch.arange(6.0).double().reshape(2, 3))
    assert found["scalar"].shape == ()


@pytest.mark.parametrize("write", [as_pt, as_old_pt])
def test_views_parameters_and_repetitions_are_read(write: Callable[..., None], tmp_path: Path) -> None:
    base = torch.arange(12.0)
    found = {
        "turned": base.reshape(3, 4).T, "every other": base[::2], "tail": base[7:], "all": base,
        "repeated": base[1:2].expand(5), "none": torch.empty(0, 3), "parameter": nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    write(found, tmp_path / "u")
    read = tensors(tmp_path / "u")
    assert list(read) == list(found)
    assert all(torch.equal(read[name], t) for name, t in found.items())
    assert not any(t.requires_grad for t in read.values())


@pytest.mark.parametrize("write", [as_pt, as_old_pt])
@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "gradients"])
def test_one_nest_is_opened(key: str, write: Callable[..., None], tmp_path: Path) -> None:
    write({"epoch": 3, key: GRADIENTS, "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}}, tmp_path / "u")
    assert same(tensors(tmp_path / "u"), GRADIENTS)


def test_a_tensor_may_be_called_like_a_nest(tmp_path: Path) -> None:
    as_pt({"model": torch.ones(2), "w": torch.ones(1)}, tmp_path / "u")
    assert list(tensors(tmp_path / "u")) == ["model", "w"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2), "w"], "got a dict with '1' (str), expected a dict of tensors by name or a list"),
        (torch.ones(2), "got a Tensor, expected a dict of tensors by name"),
        ({"w": 1.0, "v": torch.ones(1)}, "got a dict with 'w' (float), expected a dict of tensors by name"),
        ({1: torch.ones(1)}, "got a dict with 1 (Tensor), expected a dict"),
        ({"net": {"w": torch.ones(1)}}, "got a dict with 'net' (dict), expected a dict"),
        ({"model": {"a": {"w": torch.ones(1)}}}, "got a dict under model with 'a' (dict), expected a dict"),
        ({"model": {}, "gradients": {}}, "got dicts under model and gradients, expected one. Save the tensors"),
        ({"w": torch.eye(2).to_sparse()}, "got a dict with 'w' (a sparse tensor: save its to_dense()), expected"),
        ({}, "got 0 tensors, expected one for each parameter"),
        ({"model": {}}, "got 0 tensors, expected one for each parameter"),
    ],
    ids=range(10),
)  # fmt: skip
def test_other_pickles_are_refused(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "u.pt"
    torch.save(content, path)
    refused(f"{path}: {message}", lambda: tensors(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file, expected a .safetensors file, an .npz file, or a .pt"),
        (b"PK", "got a file of another kind that begins with b'PK', expected"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "got a file of another kind that begins with b'\\x89HDF\\r\\n\\x1a\\n'"),
        (pickle.dumps({"w": 1}), "got a bare pickle, which is not opened: it could run code, expected"),
        (b"PK\x03\x04" + bytes(99), "not a whole zip file, it may be truncated or changed (BadZipFile"),
        (struct.pack("<Q", 2**60) + b"{}", "header claims 1,152,921,504,606,846,976 bytes, 2 are there; get it again"),
        (struct.pack("<Q", 2) + b"{]", "not a whole safetensors file, it may be truncated or changed (SafetensorError"),
    ],
    ids=range(7),
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "u.pt"
    path.write_bytes(content)
    for read in (lambda: tensors(path), lambda: read_update(path, TARGET), lambda: load_weights(small_model(), path)):
        refused(f"{path}: ", read)
        refused(message, read)


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "u.npy", np.ones(3))
    refused("got a single .npy array without a name, expected", lambda: tensors(tmp_path / "u.npy"))


@pytest.mark.parametrize("place", ["missing", "."])
def test_no_file_is_refused(place: str, tmp_path: Path) -> None:
    refused(f"{tmp_path / place}: no such file; expected a .safetensors file", lambda: tensors(tmp_path / place))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    as_pt(GRADIENTS, tmp_path / "u")
    (tmp_path / "u").chmod(0)
    refused(f"{tmp_path / 'u'}: cannot be read (Permission denied)", lambda: tensors(tmp_path / "u"))


@every_format
def test_a_truncated_file_is_refused_at_every_length(write: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "u"
    write(GRADIENTS, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(f"{path}: ", lambda: tensors(path))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1, "a"], object), "holds objects, which are not opened: they could run code; expected numbers"),
        (np.array(["a"]), "holds type <U1; expected numbers of at most 64 bits. Save one array of numbers"),
        (np.zeros(2, [("a", "f4")]), "holds type [('a', '<f4')]; expected numbers"),
        (np.zeros(2, "V2"), "holds type |V2; expected numbers"),
        (np.zeros(2, "M8[s]"), "holds type datetime64[s]; expected numbers"),
    ],
    ids=range(5),
)
def test_arrays_of_other_than_numbers_are_refused(array: Any, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "u.npz", a=np.ones(2), b=array)
    refused(f"{tmp_path / 'u.npz'}: b.npy {message}", lambda: tensors(tmp_path / "u.npz"))


def zip_of(path: Path, members: Mapping[str, bytes], packed: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def npy(header: str, content: bytes, version: int = 1) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + content


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shape", ["(1000000, 1000000, 1000000)", "(3,)", "(0, 5)", "(-1, -2)"])
def test_an_array_that_claims_another_size_is_refused(shape: str, version: int, tmp_path: Path) -> None:
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    path = zip_of(tmp_path / "u.npz", {"a.npy": npy(head, bytes(8), version)})
    refused(f"{path}: a.npy claims shape {shape}, ", lambda: tensors(path))
    refused("but holds 8; get it again from where it was made", lambda: tensors(path))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("__import__('os').mkdir('ran')", "not a whole zip file, it may be truncated or changed (ValueError"),
        ("{'descr': '<f4'}", "not a whole zip file, it may be truncated or changed (ValueError"),
        ("(" * 5000, "not a whole zip file, it may be truncated or changed ("),
        ("{" + "1:1," * 9000 + "}", "not a whole zip file, it may be truncated or changed (ValueError"),
    ],
    ids=range(4),
)
def test_other_array_headers_are_refused(
    header: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = zip_of(tmp_path / "u.npz", {"a.npy": npy(header, bytes(8))})
    refused(f"{path}: {message}", lambda: tensors(path))
    assert not (tmp_path / "ran").exists()


def test_unknown_versions_of_arrays_are_refused(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "u.npz", {"a.npy": npy("{}", b"", 3)})
    refused("a.npy has npy version (3, 0), expected 1.0 or 2.0", lambda: tensors(path))


def test_other_zip_files_are_refused(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "u.pt", {"a.npy": b"", "readme.txt": b"hello"})
    refused(f"{path}: got a zip file with a.npy, readme.txt, expected a .safetensors file", lambda: tensors(path))


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    as_npz(GRADIENTS, path := tmp_path / "u.npz")
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("0.bias.npy", archive.read("0.bias.npy"))
    refused(f"{path}: got two members of one name, expected each name once", lambda: tensors(path))


def test_a_member_that_hides_in_a_comment_is_missed(tmp_path: Path) -> None:
    as_npz(GRADIENTS, path := tmp_path / "u.npz")
    whole = path.read_bytes()
    entries = [found.start() for found in re.finditer(b"PK\x01\x02", whole)]
    # The second entry of the directory becomes the comment of the first.
    at = entries[0] + 32
    path.write_bytes(whole[:at] + struct.pack("<H", entries[2] - entries[1]) + whole[at + 2 :])
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == len(GRADIENTS) - 1
    refused(f"{path}: not a whole zip file: the number of its members is wrong; get it again", lambda: tensors(path))


@pytest.mark.parametrize("write", [as_npz, as_pt])
def test_a_changed_number_is_noticed_by_its_checksum(write: Callable[..., None], tmp_path: Path) -> None:
    write({"w": torch.full((50,), 1.5)}, path := tmp_path / "u")
    whole = path.read_bytes()
    at = whole.index(torch.tensor([1.5, 1.5]).numpy().tobytes())
    path.write_bytes(whole[:at] + b"\1" + whole[at + 1 :])
    refused("has a wrong checksum: it was changed; get it again from where it was made", lambda: tensors(path))


# Sizes.


@every_format
def test_large_files_are_refused(write: Callable[..., None], tmp_path: Path) -> None:
    write(GRADIENTS, path := tmp_path / "u")
    size = path.stat().st_size
    message = f"{path}: is a file of {size:,} bytes, expected at most {size - 1:,}; if that is right, pass a larger"
    refused(message, lambda: tensors(path, size - 1))
    refused(message, lambda: read_update(path, TARGET, largest=size - 1))
    assert tensors(path, 100_000)


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    as_packed_npz({"w": torch.zeros(1_000_000)}, path := tmp_path / "u.npz")
    assert path.stat().st_size < 10_000
    refused(f"{path}: holds, unpacked, 4,000,", lambda: tensors(path, 3_000_000))
    assert tensors(path, 5_000_000)["w"].numel() == 1_000_000


@pytest.mark.parametrize("write", [as_pt, as_old_pt])
def test_a_repeated_number_is_as_large_as_it_claims(write: Callable[..., None], tmp_path: Path) -> None:
    write({"w": torch.ones(1).expand(10**6, 10**6)}, path := tmp_path / "u.pt")
    refused(f"{path}: claims tensors of 4,000,000,000,000 bytes, expected at most", lambda: tensors(path))


def repacked(path: Path, changes: Mapping[str, tuple[bytes, bytes]], packed: bool = False) -> None:
    """A zip file with parts of its members exchanged, and right checksums."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for end, (old, new) in changes.items():
        (name,) = (name for name in members if name.endswith(end))
        assert old in members[name]
        members[name] = members[name].replace(old, new)
    zip_of(path, members, packed)


@pytest.mark.parametrize("count", [13, 20_000, 2**31 - 1])
def test_a_pickle_cannot_reach_beyond_the_file(count: int, tmp_path: Path) -> None:
    as_pt({"w": torch.arange(12.0)}, path := tmp_path / "u.pt")
    size = struct.pack("<i", count)
    repacked(path, {"data.pkl": (b"K\x0ctq", b"J" + size + b"tq")})
    repacked(path, {"data.pkl": (b"K\x00K\x0c\x85", b"K\x00J" + size + b"\x85")})
    if count > 13:
        refused(f"{path}: not a whole torch.save file", lambda: tensors(path))
    else:  # One more number is still within the file.
        assert torch.equal(tensors(path)["w"][:12], torch.arange(12.0))


@pytest.mark.parametrize("count", [13, 20_000, 2**31 - 1])
def test_an_old_pickle_cannot_reach_beyond_the_file(count: int, tmp_path: Path) -> None:
    as_old_pt({"w": torch.arange(12.0)}, path := tmp_path / "u.pt")
    whole = path.read_bytes()
    assert b"K\x0cNt" in whole
    larger = whole.replace(b"K\x0cNt", b"J" + struct.pack("<i", count) + b"Nt")
    path.write_bytes(larger)
    refused(f"{path}: not a whole torch.save file", lambda: tensors(path))


def test_an_old_pickle_cannot_claim_what_it_never_fills(tmp_path: Path) -> None:
    as_old_pt({"w": torch.arange(12.0)}, path := tmp_path / "u.pt")
    larger = path.read_bytes().replace(b"K\x0cNt", b"J" + struct.pack("<i", 10**6) + b"Nt")
    # The list of the storages that follow is empty.
    path.write_bytes(larger[: larger.rindex(b"\x80\x02]")] + b"\x80\x02].")
    refused(f"{path}: w claims more than the", lambda: tensors(path))


def test_packed_pickles_are_refused(tmp_path: Path) -> None:
    as_pt(GRADIENTS, path := tmp_path / "u.pt")
    repacked(path, {}, packed=True)
    refused("data.pkl is compressed in a way that its writer never does", lambda: tensors(path))


def test_a_safetensors_header_that_claims_terabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "u"
    for sizes, offsets in (([2**20, 2**20], [0, 2**42]), ([2**20, 2**20], [0, 8]), ([2**62, 4], [0, 8])):
        head = f'{{"w":{{"dtype":"F32","shape":{sizes},"data_offsets":{offsets}}}}}'.encode()
        path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(8))
        refused(f"{path}: not a whole safetensors file", lambda: tensors(path))


# Nothing is executed.


class Bomb:
    """Leaves a directory behind when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trace),)


def array_of(bomb: Bomb, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, w=np.array([bomb], object))


BOMBS: dict[str, tuple[Callable[[Bomb, Path], object], Callable[[Path], object]]] = {
    "pickle": (lambda bomb, path: path.write_bytes(pickle.dumps(bomb)), lambda path: pickle.loads(path.read_bytes())),
    "pt": (lambda bomb, path: as_pt({"w": bomb}, path), lambda path: torch.load(path, weights_only=False)),
    "old pt": (lambda bomb, path: as_old_pt({"w": bomb}, path), lambda path: torch.load(path, weights_only=False)),
    "npz": (array_of, lambda path: np.load(path, allow_pickle=True)["w"]),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_and_does_not_go_off(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, trace = tmp_path / "u.pt", tmp_path / "ran"
    write, set_off = BOMBS[kind]
    write(Bomb(trace), path)
    set_off(path)  # It is live: an ordinary reader sets it off.
    assert trace.exists()
    trace.rmdir()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for read in (
        lambda: tensors(path),
        lambda: read_update(path, TARGET),
        lambda: read_pair(path, path, TARGET, DIFFERENCE),
        lambda: load_weights(small_model(), path),
    ):
        refused(f"{path}: ", read)
        assert not trace.exists()
    if "pt" in kind:
        message = (
            "got a pickle that asks for posix.mkdir, expected tensors alone; nothing was executed. Save the tensors"
        )
        refused(message, lambda: tensors(path))


@pytest.mark.parametrize("write", [as_pt, as_old_pt])
def test_whole_modules_are_refused(write: Callable[..., None], tmp_path: Path) -> None:
    write(nn.Linear(2, 2), path := tmp_path / "u.pt")
    refused("asks for torch.nn.modules.linear.Linear, expected tensors alone", lambda: tensors(path))


def test_programs_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path := tmp_path / "u.pt")
    refused(f"{path}: got a TorchScript archive, which is a program, expected tensors alone", lambda: tensors(path))


def test_a_tar_in_disguise_is_not_unpacked(tmp_path: Path) -> None:
    """A tar file whose first name is the start of an old torch.save file: torch would take it for a tar file."""
    import tarfile

    as_old_pt({"w": torch.ones(1)}, path := tmp_path / "u")
    start = path.read_bytes()[:16]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo(start.decode("latin-1")), io.BytesIO())
        for name in ("storages", "pickle", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"N.."))
    assert path.read_bytes()[:16] == start
    assert tarfile.is_tarfile(path)
    refused(f"{path}: not a whole torch.save file", lambda: tensors(path))


# Names.


def match(found: Mapping[str, Tensor]) -> Matched:
    return matched(found, TARGET)


def prefixed(prefix: str, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: t for name, t in found.items()}


def test_exact_names_match() -> None:
    made = match({"x": torch.ones(1), **dict(reversed(GRADIENTS.items()))})
    assert list(made.values) == list(GRADIENTS)
    assert all(made.values[name] is t for name, t in GRADIENTS.items())
    assert (made.missing, made.left_over, dict(made.renamed)) == ((), ("x",), {})


@settings(max_examples=20, deadline=None)
@given(
    wrappers=st.lists(st.sampled_from(["module.", "_orig_mod.", "model.", "net.", "_module."]), min_size=1, max_size=4),
    there=st.sets(st.sampled_from(NAMES), min_size=1),
)
def test_prefixes_are_taken_off(wrappers: list[str], there: set[str]) -> None:
    prefix = "".join(wrappers)
    made = match(prefixed(prefix, {name: GRADIENTS[name] for name in GRADIENTS if name in there}))
    assert list(made.values) == [name for name in NAMES if name in there]
    assert all(made.values[name] is GRADIENTS[name] for name in there)
    assert made.missing == tuple(name for name in NAMES if name not in there)
    assert made.left_over == ()
    assert dict(made.renamed) == {name: prefix + name for name in made.values}


def test_the_models_own_prefix_is_taken_off() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_model()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    target = small_target(Wrapped())
    for prefix in ("", "module.", "module.model."):
        made = matched(prefixed(prefix, GRADIENTS), target)
        assert made.missing == made.left_over == ()
        assert all(made.values[f"model.{name}"] is t for name, t in GRADIENTS.items())


def test_one_prefix_is_taken_off_and_no_more() -> None:
    first, *rest = NAMES
    made = match({f"module.{first}": GRADIENTS[first], **{f"net.{name}": GRADIENTS[name] for name in rest}})
    assert made.missing == (first,)
    assert made.left_over == (f"module.{first}",)
    # Where a name fits as it is, no prefix is taken off.
    made = match({first: GRADIENTS[first], **prefixed("module.", {name: GRADIENTS[name] for name in rest})})
    assert made.missing == tuple(rest)


def test_two_sets_of_names_are_refused() -> None:
    found = prefixed("model.", GRADIENTS) | prefixed("net.", GRADIENTS)
    refused("fit the model equally well, expected one set of names; keep the one that is meant", lambda: match(found))


@pytest.mark.parametrize("names", ["arr_{}", "{}", "layer{:03}", "w{}"])
def test_numbered_names_match_by_order(names: str) -> None:
    found = {names.format(at): t for at, t in enumerate(GRADIENTS.values(), 8)}
    made = match({name: found[name] for name in sorted(found)})
    assert made.missing == made.left_over == ()
    assert all(made.values[name] is t for name, t in GRADIENTS.items())
    assert list(made.renamed.values()) == list(found)


def test_foreign_names_match_by_order() -> None:
    found = dict(zip(["first/w", "first/b", "final/w", "final/b"], GRADIENTS.values(), strict=True))
    made = match(found)
    assert all(made.values[name] is t for name, t in GRADIENTS.items())


def test_sorted_names_match_by_their_numbers() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(12)])
    target = Target(model, losses.CrossEntropy(2), (2,))
    gradients = [torch.full((2, 2), float(at)) for at in range(12)]
    found = {f"layer{at}.kernel": t for at, t in enumerate(gradients)}
    made = matched({name: found[name] for name in sorted(found)}, target)
    assert all(torch.equal(a, b) for a, b in zip(made.values.values(), gradients, strict=True))


def test_a_whole_state_dict_matches_by_order() -> None:
    made = match({f"arr_{at}": t for at, t in enumerate(WEIGHTS.values())})
    assert all(made.values[name] is WEIGHTS[name] for name in NAMES)
    assert made.left_over == ("arr_2", "arr_3", "arr_4")


def test_other_numbers_and_shapes_do_not_match_by_order() -> None:
    tensors_ = list(GRADIENTS.values())
    for found in (tensors_[:-1], [*tensors_, torch.ones(1)], tensors_[::-1]):
        made = match({f"arr_{at}": t for at, t in enumerate(found)})
        assert not made.values
        assert made.missing == tuple(NAMES)
        assert len(made.left_over) == len(found)


def test_what_matched_says() -> None:
    found = prefixed("module.", {**WEIGHTS, "head": torch.ones(1)})
    del found["module.3.bias"]
    assert str(match(found)).splitlines() == [
        "3 of 4 parameters are there",
        "missing: 3.bias",
        "left over: module.1.running_mean, module.1.running_var, module.1.num_batches_tracked, module.head",
        "renamed: module.0.weight to 0.weight, module.0.bias to 0.bias, module.3.weight to 3.weight",
    ]
    assert str(match(GRADIENTS)) == "4 of 4 parameters are there"


def test_names_that_would_upset_a_terminal_are_quoted() -> None:
    text = str(match({**GRADIENTS, "\x1b[2J": torch.ones(1), "x" * 5000: torch.ones(1)}))
    assert text.splitlines()[1] == f"left over: [U+001B][2J, {'x' * 50} … 4,900 characters left out … {'x' * 50}"


def test_unfit_shapes_and_types_are_refused() -> None:
    found = prefixed("module.", GRADIENTS) | {"module.3.weight": torch.ones(4)}
    refused(
        "3.weight (module.3.weight in the file): got a weight of shape (4,), expected (4, 4) as the model has it",
        lambda: matched(found, TARGET, "weight"),
    )
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e5m2):
        wrong = GRADIENTS | {"0.bias": torch.ones(4).to(dtype)}
        refused(f"0.bias: got a gradient of {dtype}, expected floating-point numbers of 16 to 64", lambda: match(wrong))  # noqa: B023


# Updates.


@every_format
def test_an_update_is_read_from_every_format(write: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "u"
    for found in (
        GRADIENTS,
        prefixed("module.", GRADIENTS),
        {f"arr_{at}": t for at, t in enumerate(GRADIENTS.values())},
    ):
        write(found, path)
        update = read_update(path, TARGET)
        assert same(update.gradients, GRADIENTS)
        assert list(update.gradients) == NAMES
        assert update.header == Header()
        update = read_update(path, TARGET, DIFFERENCE, batch_size=3)
        assert update.header == Header(3, protocol=DIFFERENCE)


def test_buffers_in_an_update_are_passed_over(tmp_path: Path) -> None:
    as_pt(prefixed("module.", {**GRADIENTS, **{name: WEIGHTS[name] for name in BUFFERS}}), tmp_path / "u")
    assert same(read_update(tmp_path / "u", TARGET).gradients, GRADIENTS)


def test_frozen_parameters_in_an_update_are_passed_over(tmp_path: Path) -> None:
    model = small_model()
    model[0].weight.requires_grad_(False)
    as_pt(GRADIENTS, tmp_path / "u")
    assert list(read_update(tmp_path / "u", small_target(model)).gradients) == NAMES[1:]


def test_missing_gradients_are_refused_unless_partial(tmp_path: Path) -> None:
    path, some = tmp_path / "u.pt", {name: GRADIENTS[name] for name in NAMES[1:]}
    as_pt(some, path)
    refused(
        f"{path}: the names in the file do not fit the model: 3 of 4 parameters are there; missing: 0.weight. Expected "
        "one tensor for each of 0.weight, 0.bias, 3.weight, 3.bias. If layers were frozen or withheld, pass "
        "partial=True (--partial).",
        lambda: read_update(path, TARGET),
    )
    assert same(read_update(path, TARGET, partial=True).gradients, some)


@pytest.mark.parametrize("partial", [False, True])
def test_unknown_gradients_are_refused(partial: bool, tmp_path: Path) -> None:
    path = tmp_path / "u.pt"
    as_pt({**GRADIENTS, "head.weight": torch.ones(1)}, path)
    refused(
        "do not fit the model: 4 of 4 parameters are there; left over: head.weight. Expected",
        lambda: read_update(path, TARGET, partial=partial),
    )
    as_pt({"head.weight": torch.ones(1)}, path)
    refused(
        "0 of 4 parameters are there; missing: 0.weight, 0.bias", lambda: read_update(path, TARGET, partial=partial)
    )


def test_unfit_values_are_refused_by_file(tmp_path: Path) -> None:
    path = tmp_path / "u.pt"
    as_pt(GRADIENTS | {"0.bias": torch.full((4,), float("nan"))}, path)
    refused(f"{path}: 0.bias: 4 of 4 values are NaN or infinite", lambda: read_update(path, TARGET))
    as_pt(GRADIENTS, path)
    refused(f"{path}: got batch_size=0, expected 1 or more", lambda: read_update(path, TARGET, batch_size=0))


def test_weights_are_not_taken_for_gradients(tmp_path: Path) -> None:
    as_pt(WEIGHTS, path := tmp_path / "u.pt")
    refused(f"{path}: got the target's own weights, expected gradients or a weight", lambda: read_update(path, TARGET))
    as_pt({name: torch.zeros_like(t) for name, t in GRADIENTS.items()}, path)
    assert read_update(path, TARGET).norm == 0


@pytest.mark.parametrize("protocol", [Protocol(), DIFFERENCE, replace(DIFFERENCE, optimiser=Optimiser.ADAM)])
def test_our_own_file_speaks_for_itself(protocol: Protocol, tmp_path: Path) -> None:
    update = capture(TARGET, torch.ones(2, 4), torch.tensor([1.0, 2.0]), protocol)
    update.save(path := tmp_path / "u")
    for given_ in ((), (protocol, 2), (protocol, 1)):
        read = read_update(path, TARGET, *given_)
        assert read.header == update.header
        assert same(read.gradients, update.gradients)


def test_a_contradicted_header_wins_and_says_so(tmp_path: Path) -> None:
    update = capture(TARGET, torch.ones(2, 4), torch.tensor([1.0, 2.0]))
    update.save(path := tmp_path / "u")
    message = re.escape(f"{path}: got protocol={DIFFERENCE}, but the file's own header says {Protocol()}; the header")
    with pytest.warns(HeaderWins, match=message):
        assert read_update(path, TARGET, DIFFERENCE).header == update.header
    with pytest.warns(HeaderWins, match=r"got batch_size=3, but the file's own header says 2; the header is taken"):
        assert read_update(path, TARGET, batch_size=3).header == update.header


def test_our_own_file_must_fit(tmp_path: Path) -> None:
    path = tmp_path / "u"
    capture(small_target(small_model(seed=1)), torch.ones(1, 4), torch.tensor([1.0])).save(path)
    refused(f"{path}: the update belongs to another model", lambda: read_update(path, TARGET))
    some = {name: GRADIENTS[name] for name in NAMES[1:]}
    Update(some).save(path)
    refused(f"{path}: the update's names do not fit the model: missing 0.weight", lambda: read_update(path, TARGET))
    assert same(read_update(path, TARGET, partial=True).gradients, some)
    save_file(GRADIENTS, path, metadata={"rgap": "{}"})
    refused(f"{path}: got update format None, expected", lambda: read_update(path, TARGET))


# Pairs.


def trained(weights: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: t + 0.01 * torch.randn(t.shape, generator=generator).to(t) if t.is_floating_point() else t + 1
        for name, t in weights.items()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("prefix", ["", "module."])
@every_format
def test_a_pair_is_its_difference(write: Callable[..., None], prefix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    target = small_target(small_model(dtype))
    before = {name: t.clone() for name, t in target.model.state_dict().items()}
    after = trained(before)
    write(before, tmp_path / "before")
    write(prefixed(prefix, after), tmp_path / "after")
    update = read_pair(tmp_path / "before", tmp_path / "after", target, DIFFERENCE, batch_size=2)
    assert replace(update.header, training=None) == Header(2, protocol=DIFFERENCE)
    expected = {name: (after[name].double() - before[name].double()).to(dtype) for name in NAMES}
    assert same(update.gradients, expected)


def pair(folder: Path, before: object, after: object) -> tuple[Path, Path]:
    as_pt(before, folder / "before")
    as_pt(after, folder / "after")
    return folder / "before", folder / "after"


def test_a_pair_of_two_types_keeps_the_coarser(tmp_path: Path) -> None:
    after = {name: t.half() if t.is_floating_point() else t for name, t in trained(WEIGHTS).items()}
    update = read_pair(*pair(tmp_path, WEIGHTS, after), TARGET, DIFFERENCE)
    assert {t.dtype for t in update.gradients.values()} == {torch.float16}
    expected = (after["0.bias"].double() - WEIGHTS["0.bias"].double()).half()
    assert torch.equal(update.gradients["0.bias"], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounded_weights_are_the_targets(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_model()
    model[0].bias.data[:3] = torch.tensor([0.0, 1e-7, -3e-39])  # also what is subnormal when rounded
    target = small_target(model)
    before = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    assert read_pair(*pair(tmp_path, before, trained(before)), target, DIFFERENCE).dtype is dtype


def test_a_pair_is_what_capture_sends(tmp_path: Path) -> None:
    model = small_model(torch.float64)
    target = small_target(model)
    x, y = torch.rand(3, 4, dtype=torch.float64), torch.tensor([0.0, 1.0, 3.0])
    sent = capture(target, x, y, DIFFERENCE)
    after = {name: t + sent.gradients.get(name, 0) for name, t in model.state_dict().items()}
    update = read_pair(*pair(tmp_path, model.state_dict(), after), target, DIFFERENCE, batch_size=3)
    gradient, _ = update.to_gradient(target)
    for name, expected in capture(target, x, y).gradients.items():
        assert torch.allclose(gradient.gradients[name], expected, atol=1e-13)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    before = {name: t.clone() for name, t in WEIGHTS.items()}
    before["0.bias"][1] += 1e-4
    before["3.weight"][0, 0] += 10.0
    paths = pair(tmp_path, before, trained(before))
    share = 10 / float(before["3.weight"].abs().max())
    refused(
        f"{paths[0]}: the target has other weights than the file 'before': 2 of 4 parameters differ, 3.weight most, by "
        f"{share:.1e} of its largest value; expected the weights the client was given. Make the target with them.",
        lambda: read_pair(*paths, TARGET, DIFFERENCE),
    )
    before["0.weight"][0, 0] = float("nan")
    paths = pair(tmp_path, before, trained(before))
    refused("3 of 4 parameters differ, 0.weight most, by nan", lambda: read_pair(*paths, TARGET, DIFFERENCE))


def test_one_rounding_apart_is_refused_at_twice(tmp_path: Path) -> None:
    for ulps, fits in ((1, True), (4, False)):
        before = {name: t.clone() for name, t in WEIGHTS.items()}
        before["0.bias"] *= 1 + ulps * torch.finfo(torch.float32).eps / (1 if ulps > 1 else 2)
        paths = pair(tmp_path, before, trained(before))
        if fits:
            read_pair(*paths, TARGET, DIFFERENCE)
        else:
            refused("1 of 4 parameters differ, 0.bias most", lambda: read_pair(*paths, TARGET, DIFFERENCE))  # noqa: B023


def test_a_partial_pair_needs_both(tmp_path: Path) -> None:
    after = trained(WEIGHTS)
    del after["0.bias"]
    before = {name: t for name, t in WEIGHTS.items() if name != "3.bias"}
    paths = pair(tmp_path, before, after)
    refused(
        f"{paths[0]}: the names in the file do not fit the model: 3 of 4", lambda: read_pair(*paths, TARGET, DIFFERENCE)
    )
    update = read_pair(*paths, TARGET, DIFFERENCE, partial=True)
    assert list(update.gradients) == ["0.weight", "3.weight"]
    paths = pair(tmp_path, WEIGHTS, after)
    refused(
        f"{paths[1]}: the names in the file do not fit the model: 3 of 4", lambda: read_pair(*paths, TARGET, DIFFERENCE)
    )


def test_unfit_pairs_are_refused_by_file(tmp_path: Path) -> None:
    paths = pair(tmp_path, WEIGHTS, WEIGHTS | {"0.bias": torch.full((4,), float("inf"))})
    refused(f"{paths[1]}: 0.bias: 4 of 4 values are NaN or infinite", lambda: read_pair(*paths, TARGET, DIFFERENCE))
    paths = pair(tmp_path, WEIGHTS, WEIGHTS | {"0.bias": torch.ones(5)})
    refused(
        f"{paths[1]}: 0.bias: got a weight of shape (5,), expected (4,)", lambda: read_pair(*paths, TARGET, DIFFERENCE)
    )
    with pytest.raises(
        ValueError, match="got the protocol of a client that sends a gradient, expected that of one that"
    ):
        read_pair(*paths, TARGET, Protocol())


def test_an_update_is_not_taken_for_weights(tmp_path: Path) -> None:
    Update(GRADIENTS).save(path := tmp_path / "u")
    as_pt(WEIGHTS, tmp_path / "w")
    message = f"{path}: got an update written by rgap, expected weights; read it with read_update"
    refused(message, lambda: read_pair(tmp_path / "w", path, TARGET, DIFFERENCE))
    refused(message, lambda: load_weights(small_model(), path))


# Weights.


@every_format
@pytest.mark.parametrize("names", ["", "module.", "model._orig_mod.", "arr_{}"])
def test_weights_are_loaded_from_every_format(names: str, write: Callable[..., None], tmp_path: Path) -> None:
    wanted = trained(small_model(seed=1).state_dict())
    numbered = {names.format(at): t for at, t in enumerate(wanted.values())}
    write(numbered if "{" in names else prefixed(names, wanted), path := tmp_path / "w")
    load_weights(module := small_model(), path)
    assert same(module.state_dict(), wanted)


def test_weights_of_another_precision_are_loaded(tmp_path: Path) -> None:
    as_safetensors(small_model(torch.float64, seed=1).state_dict(), path := tmp_path / "w")
    load_weights(module := small_model(), path)
    assert torch.equal(module[0].weight, small_model(torch.float64, seed=1)[0].weight.float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0.bias": None}, "does not fit the model: missing 0.bias. Expected its whole state dict."),
        ({"x": torch.ones(1)}, "does not fit the model: unexpected x. Expected"),
        ({"1.running_var": None, "x": torch.ones(1)}, "missing 1.running_var; unexpected x. Expected"),
        ({"0.bias": torch.ones(5)}, "does not fit the model: 0.bias has shape (5,), expected (4,). Expected"),
        ({"0.bias": torch.ones(4).long()}, "0.bias has type torch.int64, expected torch.float32. Expected"),
        ({"0.bias": torch.ones(4).cfloat()}, "0.bias has type torch.complex64, expected torch.float32. Expected"),
        ({"1.num_batches_tracked": torch.ones(2)}, "1.num_batches_tracked has shape (2,), expected ()"),
    ],
    ids=range(7),
)  # fmt: skip
def test_unfit_weights_are_refused_and_the_module_stays(
    changes: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    found = {name: t for name, t in {**small_model(seed=1).state_dict(), **changes}.items() if t is not None}
    as_pt(found, path := tmp_path / "w")
    module = small_model()
    refused(f"{path}: ", lambda: load_weights(module, path))
    refused(message, lambda: load_weights(module, path))
    assert same(module.state_dict(), WEIGHTS)


def test_warnings_of_libraries_do_not_come_through(tmp_path: Path) -> None:
    """In a fresh process, where no warning has been shown before, and every warning is an error."""
    as_pt(GRADIENTS, path := tmp_path / "u")
    repacked(path, {"data.pkl": (b"torch._utils", b"torch._utilt")})
    code = (
        "import warnings; warnings.simplefilter('error'); from rgap import reading\n"
        f"try: reading.tensors({str(path)!r})\nexcept ValueError as error: print(error)"
    )
    out, err = Program(python, "-c", code, folder=tmp_path).communicate()
    assert "got a pickle that asks for torch._utilt._rebuild_tensor_v2, expected tensors" in out, err


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_whole_state_dict_brings_its_buffers(prefix: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)).train()
    target = Target(model, losses.CrossEntropy(2), (1, 4, 4), None)
    before = {prefix + name: t.clone() for name, t in model.state_dict().items()}
    after = {name: t + 1 for name, t in before.items()}
    save_file(before, tmp_path / "before.safetensors")
    save_file(after, tmp_path / "after.safetensors")
    protocol = Protocol(Sends.DIFFERENCE, learning_rate=0.1)
    update = read_pair(tmp_path / "before.safetensors", tmp_path / "after.safetensors", target, protocol)
    assert set(update.gradients) == set(target.parameters)
    assert set(update.buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert all(torch.equal(t, after[prefix + name]) for name, t in update.buffers.items())
    update.check(target)


# The client's mode.


def batch_norm(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        norm = {"one": nn.BatchNorm1d(4), "two": nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)), "none": nn.Tanh()}
        return nn.Sequential(nn.Linear(4, 4), norm[kind], nn.Linear(4, 4))


@pytest.mark.parametrize("kind", ["one", "two", "none"])
@pytest.mark.parametrize("client", ["training", "evaluation"])
@pytest.mark.parametrize("told", ["training", "evaluation"])
def test_statistics_that_moved_tell_the_clients_mode(kind: str, client: str, told: str, tmp_path: Path) -> None:
    before, model = batch_norm(kind), batch_norm(kind).train(client == "training")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    nn.functional.cross_entropy(model(torch.eye(4)[:2]), torch.tensor([0, 1])).backward()
    optimizer.step()
    as_pt(before.state_dict(), tmp_path / "before.pt")
    as_safetensors(prefixed("module.", model.state_dict()), tmp_path / "after")
    target = Target(before.train(told == "training"), losses.CrossEntropy(4), (4,), batch_size=2)
    update = read_pair(tmp_path / "before.pt", tmp_path / "after", target, DIFFERENCE, 2)
    moved = client == "training" and kind != "none"
    assert update.header.training is (True if moved else None)
    found = [text for text in preflight(target, update).findings if "mode" in text]
    assert ["the client was in training mode: batch norm" in text for text in found] == (
        [True] if moved and told == "evaluation" else []
    )
