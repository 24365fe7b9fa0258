"""What a worker does with one job. It runs in any process, on any machine that has rgap, and writes nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from torch import Tensor, nn

from rgap import defences, losses
from rgap.attacks import Attack
from rgap.attacks.named import by_name
from rgap.auditing.results import Level, gave_away, judge, span
from rgap.files import plain
from rgap.linalg.threads import one_thread
from rgap.models.named import built_in, own
from rgap.protocol import Optimiser, Protocol, Sends
from rgap.reading import load_tensors
from rgap.sweeps.job import FIGURES, canonical
from rgap.target import Target
from rgap.training import accuracy, train
from rgap.update import capture

CACHED = 4
"""Networks that a worker keeps: the jobs of one network come one after another."""


@dataclass
class Supplies:
    """What the specifications of jobs name by its SHA-256 and do not hold."""

    pictures: dict[str, Tensor] = field(default_factory=dict)
    """(channels, height, width)"""
    training: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """(n, channels, height, width) and labels (n,)"""
    weights: dict[str, bytes] = field(default_factory=dict)
    """State dicts as safetensors."""


class NotSupplied(LookupError):
    """A worker was given a job before what the job needs."""


_SUPPLIES: dict[str, Supplies] = {}
"""By the name of the run that they are for."""
# A process works at one job at a time: torch's number of threads and its random state belong to the whole process.
_ONE = threading.Lock()


def supply(run: str, supplies: Supplies) -> None:
    """Give this process what the jobs of a run will need."""
    _SUPPLIES[run] = supplies


def withdraw(run: str) -> None:
    """Forget what was for this run."""
    _SUPPLIES.pop(run, None)


def _found(kind: str, digest: str) -> Any:
    """A supply by its SHA-256, whichever run it is for."""
    for supplies in list(_SUPPLIES.values()):
        held = getattr(supplies, kind)
        if digest in held:
            return held[digest]
    raise NotSupplied(f"got no {kind} {digest[:12]} in this process, expected them before the job")


def do(spec: Mapping[str, Any]) -> dict[str, Any]:
    """One job, in one thread, so that it finds the same wherever it runs.

    Args:
        spec: as `rgap.sweeps.plan` makes it.

    Returns:
        By the names in `FIGURES`, ready for JSON.

    Raises:
        NotSupplied: see `supply`.
    """
    with _ONE, one_thread():
        return plain(_do(spec))


def _do(spec: Mapping[str, Any]) -> dict[str, Any]:
    text, labels = canonical(spec["target"]), [float(label) for label in spec["labels"]]
    batch = len(labels) // spec["clients"]
    protocol = protocol_of(spec["protocol"], spec["clients"], batch)
    target, right = _target(text)
    target = target if batch == 1 else _sized(text, batch)
    truth = torch.stack([_found("pictures", each) for each in spec["pictures"]])
    defence, attack = spec["defence"], attack_of(spec["attack"])
    obstacle = attack.obstacle(target, len(labels))
    if obstacle is not None:
        nothing = dict.fromkeys(FIGURES)
        return {**nothing, "status": "does not apply", "reason": obstacle, "accuracy": right, "seconds": 0.0}
    update, cost = capture(target, truth, torch.tensor(labels), protocol), 0.0
    if defence is not None:
        armed = defences.by_name(defence["name"], defence["strength"])
        sent = armed(update, torch.Generator().manual_seed(defence["seed"]))
        update, cost = sent, defences.gradient_error(update, sent)
    results = judge(attack(target, update), truth, labels, target.value_range or span(truth))
    found = max(results, key=gave_away)
    named = {name: getattr(found, name) for name in FIGURES if hasattr(found, name)}
    shown = {"level": found.level.value, "status": found.status.value}
    levels = (Level.EXACT, Level.RECOGNISABLE)
    shares = {e.value: sum(r.level.rank >= e.rank for r in results) / len(results) for e in levels}
    return {**named, **shown, **shares, "gradient_error": cost, "accuracy": right}


@lru_cache(CACHED)
def _sized(text: str, batch: int) -> Target:
    """The network of a specification, for batches of so many."""
    return replace(_target(text)[0], batch_size=batch)


@lru_cache(CACHED)
def _target(text: str) -> tuple[Target, float | None]:
    """The network of a specification, and which share of the pictures that it was trained on it labels right."""
    spec = json.loads(text)
    shape = tuple(spec["input_shape"])
    model = make(spec["model"], shape, spec["seed"], spec["width"])
    if spec["weights"] is not None:
        load_tensors(model, from_bytes(_found("weights", spec["weights"])))
    loss = losses.for_model(model, shape, spec["loss"])
    right = None
    if spec["stage"]:
        inputs, labels = _found("training", spec["training"]["pictures"])
        rate, batch = spec["training"]["rate"], spec["training"]["batch"]
        train(model, loss, inputs, labels, spec["stage"], rate, batch, spec["seed"])
        right = accuracy(model, inputs, labels)
    value_range = None if spec["value_range"] is None else (spec["value_range"][0], spec["value_range"][1])
    return Target(model, loss, shape, value_range), right


def attack_of(spec: Mapping[str, Any]) -> Attack:
    """The attack of a specification.

    Raises:
        ValueError: there is none by this name, or it does not have such sizes.
    """
    return by_name(spec["name"], spec["iterations"], spec["restarts"], spec["polish"])


def protocol_of(spec: Mapping[str, Any], clients: int, batch: int) -> Protocol:
    """What a client of so many samples does, as a plan says it; of fewer than a minibatch it takes one of them all.

    Raises:
        ValueError: its fields contradict each other.
    """
    fields = {name.replace("-", "_"): value for name, value in spec.items()}
    for name in {"learning_rate", "momentum", "weight_decay", "proximal", "clip_norm"} & set(fields):
        fields[name] = float(fields[name])
    if fields.get("minibatch", 0) > batch and not fields.get("drop_last"):
        del fields["minibatch"]
    steps, optimiser = fields.pop("local_steps", 1), Optimiser(fields.pop("optimiser", Optimiser.SGD.value))
    return Protocol(Sends(fields.pop("sends")), steps, optimiser=optimiser, clients=clients, **fields)


def make(name: str, input_shape: tuple[int, ...], seed: int, width: int | None) -> nn.Module:
    """A built-in network, or one of your own; the latter is told seed and width if it takes them.

    Raises:
        ModelError: there is none by this name, or it does not take the shape or the width.
    """
    if ":" not in name:
        return built_in(name, input_shape, seed, width)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return own(name, seed=seed, **({} if width is None else {"width": width}))
