"""What the client sends: the gradient and no data, kept bit for bit in a file, and refused where it does not fit."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from networks import Client, clients
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from rgap import Protocol, Target, Update, UpdateError, capture, losses
from rgap.protocol import Sends
from rgap.update import Header

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(4 * 3 * 3, 1, bias=False)
        ).to(dtype)


def small_target(model: nn.Module | None = None) -> Target:
    return Target(small_model() if model is None else model, losses.Logistic(), (3, 5, 5), (0.0, 1.0))


def sample(count: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))


LABEL = torch.tensor([1.0])
NAMES = ["0.weight", "0.bias", "3.weight"]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# The file.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_file_keeps_every_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    target = small_target(small_model(dtype=dtype))
    update = capture(target, sample(), LABEL)
    # Subnormal numbers, the sign of zero and the extremes are what a careless round trip loses.
    limits = torch.finfo(dtype)
    extremes = torch.tensor([-0.0, 0.0, limits.max, limits.min, limits.tiny, limits.smallest_normal / 2], dtype=dtype)
    gradients = dict(update.gradients)
    gradients["3.weight"] = torch.cat([extremes, gradients["3.weight"].flatten()[6:]])[None]
    Update(gradients, update.header).save(tmp_path / "update.safetensors")
    read = Update.load(tmp_path / "update.safetensors", target)
    assert read.header == update.header
    assert set(read.gradients) == set(NAMES)
    for name, gradient in gradients.items():
        assert read.gradients[name].dtype is dtype
        assert read.gradients[name].shape == gradient.shape
        assert bits(read.gradients[name]) == bits(gradient)


@pytest.mark.parametrize(
    "header",
    [
        Header(),
        Header(batch_size=7, loss="hinge", input_shape=(3, 5, 5), fingerprint="ab", training=True),
        Header(training=False, input_shape=()),
    ],
)
def test_a_file_keeps_the_header(header: Header, tmp_path: Path) -> None:
    Update({"w": torch.ones(2)}, header).save(tmp_path / "u")
    assert Update.load(tmp_path / "u").header == header


def test_gradients_that_are_views_are_saved_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    given_ = {"a": base.reshape(3, 4).T, "b": base[::2], "c": base[:1].expand(5)}
    Update(given_).save(tmp_path / "u")
    read = Update.load(tmp_path / "u").gradients
    assert all(torch.equal(read[name], tensor) for name, tensor in given_.items())


@pytest.mark.parametrize("count", [1, 2])
def test_the_file_holds_no_data(count: int, tmp_path: Path) -> None:
    target, x = small_target(), sample(count)
    capture(target, x, torch.ones(count)).save(tmp_path / "u")
    with safe_open(tmp_path / "u", framework="pt") as file:
        text, names = file.metadata(), list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    assert set(text) == {"rgap"}
    assert set(json.loads(text["rgap"])) == {
        "format", "kind", "batch_size", "loss", "input_shape", "fingerprint", "training", "protocol",
    }  # fmt: skip
    assert {name: t.shape for name, t in tensors.items()} == {n: p.shape for n, p in target.parameters.items()}
    assert not any(t.shape[-3:] == x.shape[-3:] or t.numel() == x.numel() for t in tensors.values())
    content = (tmp_path / "u").read_bytes()
    assert not any(x[at].numpy().tobytes()[:64] in content for at in range(count))


def test_an_update_holds_no_tensor_but_its_gradients() -> None:
    update = capture(small_target(), sample(), LABEL)
    assert {f.name for f in dataclasses.fields(update)} == {"gradients", "header", "buffers"}
    assert not update.buffers
    assert not any(isinstance(value, torch.Tensor) for value in vars(update.header).values())
    assert set(vars(update)) == {"gradients", "header", "buffers"}


# Frozen.


def test_an_update_cannot_be_changed() -> None:
    given_ = {"w": torch.ones(3)}
    update = Update(given_)
    given_["w"].zero_()
    given_["extra"] = torch.ones(1)
    assert list(update.gradients) == ["w"]
    assert torch.equal(update.gradients["w"], torch.ones(3))
    with pytest.raises(TypeError, match="does not support item assignment"):
        update.gradients["w"] = torch.zeros(3)  # type: ignore[index]
    with pytest.raises(TypeError, match="does not support item deletion"):
        del update.gradients["w"]  # type: ignore[attr-defined]
    with pytest.raises(dataclasses.FrozenInstanceError):
        update.gradients = {}  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        update.header.batch_size = 2  # type: ignore[misc]


def test_gradients_are_cut_from_their_graph() -> None:
    w = torch.ones(3, requires_grad=True)
    assert not Update({"w": 2 * w}).gradients["w"].requires_grad


@pytest.mark.parametrize("coarse", DTYPES, ids=str)
def test_dtype_is_the_coarsest(coarse: torch.dtype) -> None:
    kinds = [kind for kind in DTYPES if torch.finfo(kind).eps <= torch.finfo(coarse).eps]
    for order in (kinds, kinds[::-1]):
        assert Update({str(kind): torch.ones(1, dtype=kind) for kind in order}).dtype is coarse


def test_norm_is_over_all_gradients() -> None:
    # In float16 the squares alone would overflow.
    update = Update({"a": torch.full((2, 2), 300.0, dtype=torch.float16), "b": torch.tensor([800.0])})
    assert update.norm == 1000.0


# Refusals.


def refused(message: str, of: Callable[[], object]) -> None:
    with pytest.raises(UpdateError, match=re.escape(message)):
        of()


def test_an_empty_update_is_refused() -> None:
    refused("holds no gradient: got 0 tensors, expected one for each trained parameter", lambda: Update({}))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_other_than_floating_point_is_refused(dtype: torch.dtype) -> None:
    message = f"w: got {dtype}, expected floating-point gradients"
    refused(message, lambda: Update({"w": torch.ones(3).to(dtype)}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(value: float, dtype: torch.dtype) -> None:
    gradient = torch.ones(2, 3, dtype=dtype)
    gradient[0, 1] = gradient[1, 2] = value
    message = "w: 2 of 6 values are NaN or infinite, expected finite gradients; check the client's loss scaling"
    refused(message, lambda: Update({"v": torch.ones(1), "w": gradient}))


def changed(update: Update, **changes: torch.Tensor | None) -> Update:
    """The update with tensors replaced, added, or (None) left out; `__` stands for a dot."""
    gradients: dict[str, torch.Tensor] = dict(update.gradients)
    for key, tensor in changes.items():
        name = key.lstrip("_").replace("__", ".")
        if tensor is None:
            del gradients[name]
        else:
            gradients[name] = tensor
    return Update(gradients, update.header)


def test_missing_and_extra_names_are_refused() -> None:
    target = small_target()
    update = capture(target, sample(), LABEL)
    update.check(target)
    every = "Expected one gradient for each of 0.weight, 0.bias, 3.weight."
    refused(f"do not fit the model: missing 0.bias. {every}", lambda: changed(update, _0__bias=None).check(target))
    extra = changed(update, x=torch.ones(1))
    refused(f"do not fit the model: unknown x. {every}", lambda: extra.check(target))
    both = changed(update, _3__weight=None, x=torch.ones(1), y=torch.ones(1))
    refused(f"do not fit the model: missing 3.weight; unknown x, y. {every}", lambda: both.check(target))


def test_long_lists_of_names_are_cut() -> None:
    target = small_target()
    update = Update({f"p{at}": torch.ones(1) for at in range(11)})
    refused("unknown p0, p1, p2, p3, p4, p5, p6, p7 and 3 more. Expected", lambda: update.check(target))


def test_wrong_shapes_are_refused() -> None:
    target = small_target()
    update = capture(target, sample(), LABEL)
    flat = changed(update, _3__weight=torch.ones(36))
    message = "3.weight: got a gradient of shape (36,), expected (1, 36) as the model has it"
    refused(message, lambda: flat.check(target))
    apart = changed(update, _3__weight=torch.ones(5, 1, 36))
    message = (
        "got a gradient of shape (5, 1, 36), expected (1, 36) as the model has it, or the mean of one for each sample"
    )
    refused(message, lambda: apart.check(target))
    turned = changed(update, _0__weight=torch.ones(3, 4, 3, 3))
    message = "0.weight: got a gradient of shape (3, 4, 3, 3), expected (4, 3, 3, 3) as the model has it"
    refused(message, lambda: turned.check(target))


def test_another_models_update_is_refused(tmp_path: Path) -> None:
    mine, other = small_target(), small_target(small_model(seed=1))
    update = capture(other, sample(), LABEL)
    update.check(other)
    message = (
        f"belongs to another model or another checkpoint: got fingerprint {other.fingerprint[:12]}, expected "
        f"{mine.fingerprint[:12]}. Load the weights with which the gradient was taken."
    )
    refused(message, lambda: update.check(mine))
    path = tmp_path / "other"
    update.save(path)
    refused(f"{path}: the update {message}", lambda: Update.load(path, mine))
    assert Update.load(path).header.fingerprint == other.fingerprint


def test_an_update_that_says_nothing_is_not_refused() -> None:
    target = small_target()
    Update(capture(target, sample(), LABEL).gradients).check(target)


def test_another_input_shape_is_refused() -> None:
    target = small_target()
    update = Update(capture(target, sample(), LABEL).gradients, Header(input_shape=(3, 6, 6)))
    refused("was taken on inputs of shape (3, 6, 6), expected (3, 5, 5)", lambda: update.check(target))


def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    target, path = small_target(), tmp_path / "u"
    changed(capture(target, sample(), LABEL), _0__bias=None).save(path)
    refused(f"{path}: the update's names do not fit the model: missing 0.bias", lambda: Update.load(path, target))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "the update holds no gradient: got 0 tensors"),
        ({"w": torch.ones(2, dtype=torch.int32)}, "w: got torch.int32, expected floating-point gradients"),
        ({"w": torch.tensor([1.0, float("nan")])}, "w: 1 of 2 values are NaN or infinite"),
    ],
)
def test_a_file_with_unfit_tensors_is_refused(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    path = tmp_path / "u"
    save_file(tensors, path, metadata={"rgap": json.dumps(GOOD)})
    refused(f"{path}: {message}", lambda: Update.load(path))


GOOD = {
    "format": 1, "kind": "gradient", "batch_size": 1, "loss": "logistic", "input_shape": [3, 5, 5],
    "fingerprint": None, "training": False,
}  # fmt: skip


def with_header(path: Path, text: str | None) -> Path:
    save_file({"w": torch.ones(2)}, path, metadata=None if text is None else {"rgap": text})
    return path


def test_a_good_header_written_by_hand_is_read(tmp_path: Path) -> None:
    read = Update.load(with_header(tmp_path / "u", json.dumps(GOOD)))
    assert read.header == Header(1, "logistic", (3, 5, 5), None, False)
    least = {"format": 1, "kind": "gradient", "batch_size": 3}
    assert Update.load(with_header(tmp_path / "v", json.dumps(least))).header == Header(3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no rgap header; expected an update written by rgap.Update.save"),
        ("", "the header is not JSON (Expecting value"),
        ("{'format': 1}", "the header is not JSON (Expecting property name"),
        ("[" * 100_000, "the header is not JSON ("),
        ("[1]", "the header is list, expected an object"),
        ("null", "the header is NoneType, expected an object"),
        ('"format"', "the header is str, expected an object"),
        ("{}", "got update format None, expected 2; read it with the version of rgap that wrote it"),
        (json.dumps(GOOD | {"format": 3}), "got update format 3, expected 2; read it with the version of rgap"),
        (json.dumps(GOOD | {"format": "1"}), "got update format '1', expected 2"),
        (json.dumps(GOOD | {"kind": "weights"}), "got an update of kind 'weights', expected 'gradient'"),
        (json.dumps({"format": 1, "batch_size": 1}), "got an update of kind None, expected 'gradient'"),
    ],
)
def test_other_headers_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = with_header(tmp_path / "u", text)
    refused(f"{path}: {message}", lambda: Update.load(path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("batch_size", value) for value in (0, -1, 1.5, "1", None, True, [1])],
        *[("loss", value) for value in (1, ["logistic"], False)],
        *[("fingerprint", value) for value in (12, {}, True)],
        *[("training", value) for value in (0, "yes", [])],
        *[("input_shape", value) for value in (3, "3,5,5", [3.0, 5], [3, None], [True, 5], {"0": 3})],
    ],
)
def test_header_fields_of_the_wrong_type_are_refused(field: str, value: object, tmp_path: Path) -> None:
    text = json.dumps(GOOD | {field: value})
    path = with_header(tmp_path / "u", text)
    refused(f"{path}: a field of the header has the wrong type: {text[:200]}", lambda: Update.load(path))


def test_a_missing_batch_size_is_refused(tmp_path: Path) -> None:
    path = with_header(tmp_path / "u", json.dumps({"format": 1, "kind": "gradient"}))
    refused("a field of the header has the wrong type", lambda: Update.load(path))


def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path) -> None:
    target, path = small_target(), tmp_path / "u"
    capture(target, sample(), LABEL).save(path)
    whole = path.read_bytes()
    Update.load(path, target)
    for length in [*range(0, 40), *range(40, len(whole), 61), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(f"{path}: not a whole safetensors file, it may be truncated (", lambda: Update.load(path, target))
    path.write_bytes(whole + b"more")
    refused(f"{path}: not a whole safetensors file", lambda: Update.load(path, target))


@pytest.mark.parametrize("place", ["missing", "."])
def test_no_file_is_refused(place: str, tmp_path: Path) -> None:
    path = tmp_path / place
    refused(f"{path}: no such file; expected an update written by rgap.Update.save", lambda: Update.load(path))


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_is_refused_and_not_run(how: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "u", tmp_path / "ran"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Bomb(trace)))
    else:
        torch.save({"w": Bomb(trace)}, path)
    # The bomb is live: an ordinary reader sets it off.
    if how == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.exists()
    trace.unlink()
    refused(f"{path}: not a whole safetensors file", lambda: Update.load(path))
    assert not trace.exists()


def test_a_pickle_in_the_header_is_only_text(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    text = pickle.dumps(Bomb(trace), protocol=0).decode("ascii")
    path = with_header(tmp_path / "u", text)
    refused(f"{path}: the header is not JSON", lambda: Update.load(path))
    assert not trace.exists()


# Samples.


@pytest.mark.parametrize(
    ("stated", "expected", "samples"), [(1, 1, 1), (1, 4, 4), (3, 1, 3), (3, 4, 3)], ids=lambda number: str(number)
)
def test_the_client_tells_over_how_many_samples_it_averaged(stated: int, expected: int, samples: int) -> None:
    """One sample is what a client that says nothing is taken to say; the target then knows better."""
    target = Target(small_model(), losses.Logistic(), (3, 5, 5), batch_size=expected)
    update = Update({"w": torch.ones(2)}, Header(batch_size=stated))
    assert update.samples(target) == samples
    assert Update({"w": torch.ones(2)}).samples(target) == expected


# Capture.


def by_autograd(model: nn.Module, loss: losses.Loss, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mean over the batch, sample by sample, with the ordinary backward pass."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for at in range(len(x)):
        value = loss.value(y[at].to(x.dtype) * model(x[at : at + 1]).reshape(()))
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            total[name] += 0 if gradient is None else gradient / len(x)
    return total


@settings(max_examples=15, deadline=None)
@given(clients())
def test_capture_is_the_gradient_of_the_plain_model(client: Client) -> None:
    update = capture(client.target, client.x, client.y)
    expected = by_autograd(client.target.model, client.target.loss, client.x, client.y)
    assert list(update.gradients) == list(expected)
    for name, gradient in expected.items():
        assert torch.allclose(update.gradients[name], gradient, rtol=1e-10, atol=1e-14)


def test_capture_averages_over_the_batch() -> None:
    model = small_model(dtype=torch.float64)
    x, y = sample(3).double(), torch.tensor([1, -1, 1])
    update = capture(small_target(model), x, y)
    for name, gradient in by_autograd(model, losses.Logistic(), x, y).items():
        assert torch.allclose(update.gradients[name], gradient, rtol=1e-10)
    assert update.header.batch_size == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_capture_keeps_the_models_precision(dtype: torch.dtype) -> None:
    update = capture(small_target(small_model(dtype=dtype)), sample().double(), LABEL)
    assert {gradient.dtype for gradient in update.gradients.values()} == {dtype}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_capture_keeps_labels_that_are_coarser_in_the_models_type(dtype: torch.dtype) -> None:
    """bfloat16 has no 257."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(3, 300).to(dtype)
    target = Target(model, losses.CrossEntropy(300), (3,))
    update = capture(target, sample(1).flatten(1)[:, :3], torch.tensor([257.0]))
    assert (update.gradients["bias"] < 0).nonzero().flatten().tolist() == [257]


def test_what_capture_says() -> None:
    target = small_target()
    assert capture(target, sample(), LABEL).header == Header(1, "logistic", (3, 5, 5), target.fingerprint, True)
    target.model.eval()
    assert capture(target, sample(), LABEL).header.training is False


def test_frozen_parameters_are_not_sent() -> None:
    model = small_model()
    model[0].bias.requires_grad_(False)
    assert list(capture(small_target(model), sample(), LABEL).gradients) == ["0.weight", "3.weight"]


class Idle(nn.Module):
    """A model with a parameter that its output does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 1), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_an_unused_parameter_has_gradient_zero() -> None:
    update = capture(Target(Idle(), losses.Logistic(), (4,)), torch.ones(1, 4), LABEL)
    assert torch.equal(update.gradients["idle.weight"], torch.zeros(2, 4))
    assert update.gradients["used.weight"].abs().min() > 0


class Breaks(nn.Module):
    """Fails in its forward pass, once armed, after batch norm has seen the batch."""

    armed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.armed:
            raise RuntimeError("armed")
        return x


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_capture_leaves_the_model_as_it_was(training: bool, fails: bool) -> None:
    breaks = Breaks()
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), breaks, nn.Flatten(), nn.Linear(36, 1)
    )
    target = small_target(model)
    model.train(training)
    model[2].train(not training)  # a module may have a mode of its own
    for at, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(at)) if at % 2 else None
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = [(p, None if p.grad is None else p.grad.clone(), p.requires_grad) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    breaks.armed = fails
    if fails:
        with pytest.raises(RuntimeError, match="armed"):
            capture(target, sample(2), torch.tensor([1.0, -1.0]))
    else:
        update = capture(target, sample(2), torch.tensor([1.0, -1.0]))
        assert update.header.training is training
        assert update.norm > 0
    assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == {
        name: bits(tensor) for name, tensor in before.items()
    }
    assert [module.training for module in model.modules()] == modes
    for (same, gradient, trained), parameter in zip(held, model.parameters(), strict=True):
        assert parameter is same
        assert parameter.requires_grad is trained
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


def test_capture_leaves_the_data_as_it_was() -> None:
    x, y = sample(), LABEL.clone()
    kept = x.clone()
    capture(small_target(), x, y)
    assert torch.equal(x, kept)
    assert torch.equal(y, LABEL)
    assert x.grad is None
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((1, 1, 5, 5), ": these are grey pictures, the model takes colour"),
        ((3, 5, 5), ": the batch dimension is missing, use x[None]"),
        ((1, 3, 5, 6), ""),
        ((1, 5, 5, 3), ""),
        ((0, 3, 5, 5), ""),
        ((75,), ""),
        ((1, 75), ""),
        ((1, 1, 3, 5, 5), ""),
        ((), ""),
    ],
)
def test_inputs_of_the_wrong_shape_are_refused(shape: tuple[int, ...], hint: str) -> None:
    message = f"got inputs of shape {shape}, expected (batch, 3, 5, 5){hint}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        capture(small_target(), torch.rand(shape), LABEL)


@pytest.mark.parametrize("shape", [(), (2,), (1, 1)])
def test_labels_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    message = f"got labels of shape {shape}, expected (1,), one for each input"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        capture(small_target(), sample(), torch.ones(shape))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1.0, 0.0], "got label 0, expected -1 or 1 for the logistic loss; write class 0 as -1, or take the loss bce"),
        ([2.0, 1.0], "got label 2, expected -1 or 1 for the logistic loss"),
        ([-1.0, 0.5], "got label 0.5, expected -1 or 1 for the logistic loss; real values are for the loss mse"),
        ([-1.0, float("nan")], "got label nan, expected -1 or 1 for the logistic loss"),
    ],
)
def test_unknown_labels_are_refused(labels: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        capture(small_target(), sample(2), torch.tensor(labels))


def test_a_gradient_that_overflows_is_refused() -> None:
    model = small_model(dtype=torch.float16)
    model[3].weight.data.fill_(6e4)
    with pytest.raises(UpdateError, match="values are NaN or infinite, expected finite gradients"):
        capture(small_target(model), sample(), -LABEL)


def test_printed_it_is_one_line_without_values() -> None:
    update = Update({"w": torch.ones(2, 3), "b": torch.zeros(2)}, Header(4, "logistic"))
    assert repr(update) == str(update)
    assert str(update) == "Update: gradient of 4 sample(s), logistic loss; 2 tensors, 8 values in float32, norm 2.45"
    protocol = Protocol(Sends.DIFFERENCE, learning_rate=0.1)
    assert str(Update({"w": torch.ones(1)}, Header(protocol=protocol))).startswith("Update: weight difference of 1")


@pytest.mark.parametrize("coarse", [False, True])
def test_what_rounding_leaves_of_zero_says_nothing_of_the_precision(coarse: bool) -> None:
    # A bias in front of a batch norm in training mode: its gradient is zero but for the rounding of sums.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 5, generator=generator)
    weight = weight.bfloat16().float() if coarse else weight
    bias = torch.randint(-120, 120, (64,), generator=generator) * 2.0**-34
    update = Update({"0.weight": weight, "0.bias": bias}, Header(4))
    assert update.precisions["0.bias"] > 1e-3
    assert update.precision == update.precisions["0.weight"]
    assert (update.precision == torch.finfo(torch.float32).eps) is not coarse
