"""Names, orders and counts as other programs write them: every tensor still finds its parameter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rgap import Target, losses, reading
from rgap.protocol import Protocol, Sends
from rgap.update import UpdateError

Named = dict[str, Tensor]


class Parts(nn.Module):
    """Two parts, the first with batch norm."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.features = nn.Sequential(nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten())
            self.classifier = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second = (nn.Linear(5, 5, bias=False) for _ in range(2))
            self.head = nn.Linear(5, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def gradients(model: nn.Module) -> Named:
    return {name: torch.randn(p.shape) for name, p in model.named_parameters()}


def loaded(found: Named, path: Path) -> Named:
    torch.save(found, path)
    reading.load_weights(model := Parts(), path)
    return model.state_dict()


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: name.replace("features.", "features.module."),
        lambda name: name.replace("features.", "features._orig_mod.").replace("classifier.", "classifier.base_layer."),
        lambda name: name.replace("features.0.", "features.0._checkpoint_wrapped_module."),
        lambda name: "_fsdp_wrapped_module." + name.replace("features.", "features._fsdp_wrapped_module."),
        lambda name: "base_model.model." + name,
        lambda name: "module." + name.replace("features.", "features._orig_mod.module."),
    ],
    ids=["DataParallel", "compile and adapter", "checkpoint", "FSDP", "adapter", "several"],
)
def test_wrappers_stand_anywhere_in_a_name(wrapped: Callable[[str], str], tmp_path: Path) -> None:
    wanted = Parts(seed=1).state_dict()
    found = loaded({wrapped(name): t for name, t in wanted.items()}, tmp_path / "w.pt")
    assert all(torch.equal(found[name], t) for name, t in wanted.items())
    model = Parts()
    target = Target(model.eval(), losses.CrossEntropy(4), (1, 6))
    sent = gradients(model)
    read = reading.matched({wrapped(name): t for name, t in sent.items()}, target)
    assert all(read.values[name] is t for name, t in sent.items())


def test_a_model_may_be_wrapped_too(tmp_path: Path) -> None:
    model = Parts()
    model.features = nn.Sequential()  # type: ignore[assignment]
    model.features.module = Parts().features
    target = Target(model.eval(), losses.CrossEntropy(4), (1, 6))
    sent = gradients(Parts())
    assert not reading.matched(sent, target).missing


@pytest.mark.parametrize("dropped", ["first.weight", "second.weight", None])
def test_tied_weights_have_one_of_their_names_or_both(dropped: str | None, tmp_path: Path) -> None:
    wanted = {name: t for name, t in Tied(seed=1).state_dict().items() if name != dropped}
    torch.save(wanted, path := tmp_path / "w.pt")
    reading.load_weights(model := Tied(), path)
    assert torch.equal(model.first.weight, Tied(seed=1).first.weight)
    target = Target(model.eval(), losses.CrossEntropy(3), (5,))
    tied = "second.weight" if dropped == "first.weight" else "first.weight"
    sent = {tied: torch.ones(5, 5), "head.weight": torch.ones(3, 5), "head.bias": torch.ones(3)}
    assert not reading.matched(sent, target).missing


@pytest.mark.parametrize(
    "pack",
    [
        list,
        tuple,
        lambda values: {"gradients": list(values)},
        lambda values: {str(at): t for at, t in enumerate(values)},
    ],
    ids=["list", "tuple", "nest", "numbered"],
)
def test_tensors_without_names_are_in_the_models_order(pack: Callable[[list[Tensor]], object], tmp_path: Path) -> None:
    model = Parts()
    target = Target(model.eval(), losses.CrossEntropy(4), (1, 6))
    sent = gradients(model)
    torch.save(pack(list(sent.values())), path := tmp_path / "g.pt")
    read = reading.read_update(path, target).gradients
    assert all(torch.equal(read[name], t) for name, t in sent.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda found: {name: v.astype(np.float32) for name, v in found.items()},
        lambda found: {name: np.atleast_1d(v) for name, v in found.items()},
        lambda found: {name: np.atleast_1d(v) / 2 if "num_b" in name else v for name, v in found.items()},
        lambda found: {name: v for name, v in found.items() if "num_batches" not in name},
    ],
    ids=["floats", "arrays of one", "fractions", "none"],
)
@pytest.mark.parametrize("names", [True, False])
def test_counts_of_batches_are_as_servers_make_them(
    names: bool, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    wanted = Parts(seed=1).state_dict()
    found = change({name: t.numpy() for name, t in wanted.items()})
    np.savez(path := tmp_path / "w.npz", **({name: v for name, v in found.items()} if names else {}))
    if not names:
        np.savez(path, *found.values())
    reading.load_weights(model := Parts(), path)
    assert all(
        torch.equal(t, wanted[name])
        for name, t in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    )


def test_what_belongs_to_no_part_of_the_model_is_ignored_on_demand(tmp_path: Path) -> None:
    wanted = Parts(seed=1).state_dict()
    more = {**wanted, "metric.total": torch.ones(()), "loss.weight": torch.ones(4)}
    torch.save({"state_dict": more, "epoch": 3}, path := tmp_path / "lightning.ckpt")
    with pytest.raises(UpdateError, match=r"unexpected metric.total, loss.weight.*--ignore"):
        reading.load_weights(Parts(), path)
    reading.load_weights(model := Parts(), path, ignore=("metric", "loss."))
    assert all(torch.equal(t, wanted[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("change", [lambda v: v, np.atleast_1d, lambda v: v.astype(np.float32)])
def test_arrays_before_and_after_training_are_a_difference(
    change: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    """As a server keeps them: the whole state, in its order, without names."""
    before, after = Parts(), Parts(seed=1)
    for name, model in (("before", before), ("after", after)):
        np.savez(tmp_path / f"{name}.npz", *(change(t.numpy()) for t in model.state_dict().values()))
    target = Target(before.eval(), losses.CrossEntropy(4), (1, 6))
    protocol = Protocol(Sends.DIFFERENCE, learning_rate=0.5)
    update = reading.read_pair(tmp_path / "before.npz", tmp_path / "after.npz", target, protocol)
    wanted = dict(after.named_parameters())
    assert all(torch.allclose(t + target.parameters[name], wanted[name]) for name, t in update.gradients.items())
