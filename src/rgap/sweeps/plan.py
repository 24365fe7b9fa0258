"""The plan of a sweep: a TOML file whose lists are multiplied out into jobs."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jsonschema.exceptions import best_match
from safetensors.torch import save as to_bytes
from torch import Tensor

from rgap import data, defences, losses, reading
from rgap.data import Images
from rgap.files import read_toml
from rgap.losses import Loss
from rgap.models.named import ModelError
from rgap.printable import line
from rgap.schema import validator
from rgap.sweeps.job import AXES, Job, canonical, sha256
from rgap.sweeps.schema import DEFAULTS, IMAGES, SCHEMA, TRAINING
from rgap.sweeps.work import Supplies, attack_of, make, protocol_of

VERSION = 1
"""Of what a job's result depends on beside its specification. Raised when results would differ: old rows stay."""


class PlanError(ValueError):
    """A plan that makes no jobs; says where it is wrong and what was expected."""


@dataclass(frozen=True)
class Plan:
    """What is multiplied, as the TOML file says, defaults filled in.

    Args:
        spec: by the names in `SCHEMA`.
        folder: that paths in the plan start from.
    """

    spec: Mapping[str, Any]
    folder: Path

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            PlanError: no such file, not TOML, or against the schema; says where.
        """
        path = Path(path)
        try:
            spec = read_toml(path)
        except ValueError as error:
            raise PlanError(f"{error}; expected a plan, see docs/sweeps.md") from error
        try:
            return cls.of(spec, path.parent)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

    @classmethod
    def of(cls, spec: Mapping[str, Any], folder: str | Path = ".") -> Plan:
        """A plan from Python.

        Raises:
            PlanError: against the schema, or a name that is not known.
        """
        # Through JSON: what a plan may hold is what its jobs can be made of.
        try:
            spec = json.loads(json.dumps(dict(spec), default=str))
            error = best_match(validator(SCHEMA).iter_errors(spec))
        except RecursionError:
            raise PlanError("nested too deep; the fields of a plan are in docs/sweeps.md") from None
        if error is not None:
            place = error.json_path.removeprefix("$.").removeprefix("$") or "the plan"
            message = line(error.message, 200)
            raise PlanError(f"{line(place, 200)}: {message}; the fields of a plan are in docs/sweeps.md")
        whole = {**DEFAULTS, **spec}
        whole["images"] = {**IMAGES, **whole["images"]}
        whole["training"] = {**TRAINING, **whole["training"]}
        plan = cls(whole, Path(folder))
        plan._check()
        return plan

    def _check(self) -> None:
        """Refuse names that are not known before anything runs."""
        for model in self.models:
            value_range = model["value-range"]
            if value_range != "none" and not value_range[0] < value_range[1]:
                raise PlanError(f"value-range is {value_range}: expected [low, high] with low < high, or none")
        try:
            for model, width in itertools.product(self.models, self.spec["widths"]):
                make(model["name"], tuple(model["input-shape"]), self.spec["seeds"][0], width)
            for attack in self.attacks:
                attack_of(attack)
            for each in self.defences:
                if each is not None:
                    defences.by_name(each["name"], each["strength"])
            for clients, protocol, size in itertools.product(
                self.spec["clients"], self.protocols.values(), self.spec["batch-sizes"]
            ):
                protocol_of(protocol, clients, size).minibatches(size)
        except ModelError as error:
            raise PlanError(f"models: {error}") from error
        except (ValueError, TypeError) as error:
            raise PlanError(str(error)) from error

    @cached_property
    def models(self) -> list[dict[str, Any]]:
        """Each with name, weights, shape, range and loss."""
        common = {name: self.spec[name] for name in ("input-shape", "value-range", "loss")}
        return [{"weights": None, **common, **each} for each in _tables(self.spec["models"], "name")]

    @cached_property
    def attacks(self) -> list[dict[str, Any]]:
        """Each with its name and sizes."""
        sizes = {"iterations": None, "restarts": None, "polish": False}
        return [{**sizes, **each} for each in _tables(self.spec["attacks"], "name")]

    @cached_property
    def defences(self) -> list[dict[str, Any] | None]:
        """Each with its name and one strength; None for an update that is left as it is."""
        found: list[dict[str, Any] | None] = []
        for table in _tables(self.spec["defences"], "name"):
            if table == {"name": "none"}:
                found.append(None)
                continue
            defence = defences.by_name(table["name"])
            strengths = table.get("strengths", [defence.strength])
            levels = type(defence).levels if strengths == "all" else strengths
            found += [{"name": type(defence).__name__, "strength": float(level)} for level in levels]
        return found

    @cached_property
    def protocols(self) -> dict[str, dict[str, Any]]:
        """By the name that is shown, what each says of a client."""
        tables = _tables(self.spec["protocols"], "sends")
        return {table.pop("name", "") or _shown(table): table for table in tables}

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the samples of all models."""
        return tuple(dict.fromkeys(tuple(model["input-shape"]) for model in self.models))

    @cached_property
    def pictures(self) -> dict[tuple[int, ...], Images]:
        """By shape, the pictures that are attacked and those that are trained on, which begin with the attacked ones.

        Raises:
            DataError: they cannot be read; says which.
            PlanError: a model does not take pictures, or there are too few.
        """
        return {shape: self._pictures(shape) for shape in self.shapes}

    def _pictures(self, shape: tuple[int, ...]) -> Images:
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise PlanError(f"input-shape is {list(shape)}: expected (1 or 3, height, width), a picture's")
        count, folder = self.spec["images"]["count"], self.spec["images"]["data"]
        most = max(count, self.spec["training"]["images"]) if max(self.spec["stages"]) else count
        channels, size = shape[0], shape[1:]
        if folder is None:
            found = data.photographs(min(most, 25), size=(size[0], size[1]), channels=channels)
        else:
            found = data.folder(self.folder / folder, size=(size[0], size[1]), channels=channels, limit=most)
        if len(found) < count:
            raise PlanError(f"images.count is {count}, but there are {len(found)} pictures; expected at most so many")
        return found

    def jobs(self) -> Iterator[Job]:
        """All cells of the product, those of one network together."""
        for model in self.models:
            images = self.pictures[tuple(model["input-shape"])]
            loss, source = self._loss(model), _source(model["name"])
            labels = data.labels(images, loss)
            weights = None if model["weights"] is None else sha256(self._weights(model["weights"]))
            name = model["name"] if model["weights"] is None else f"{model['name']}, {Path(model['weights']).name}"
            training = {**self.spec["training"], "pictures": digest(images.inputs)}
            for seed, width, stage in itertools.product(self.spec["seeds"], self.spec["widths"], self.spec["stages"]):
                target = {
                    "model": model["name"],
                    "source": source,
                    "weights": weights,
                    "input_shape": model["input-shape"],
                    "value_range": None if model["value-range"] == "none" else model["value-range"],
                    "loss": loss.name,
                    "seed": seed,
                    "width": width,
                    "stage": stage,
                    "training": training if stage else None,
                }
                yield from self._cells((name, seed, width, stage), target, images, labels)

    def _cells(
        self, network: tuple[Any, ...], target: dict[str, Any], images: Images, labels: Sequence[float]
    ) -> Iterator[Job]:
        """Every batch of pictures, protocol, attack and defence against one network."""
        count = self.spec["images"]["count"]
        for size, clients in itertools.product(self.spec["batch-sizes"], self.spec["clients"]):
            together = size * clients
            if together > count:
                raise PlanError(
                    f"images.count is {count}, expected {together} or more: a batch of {size} of {clients} clients"
                )
            for at in range(0, count - together + 1, together):
                pictures = [digest(each) for each in images.inputs[at : at + together]]
                name = images.names[at] + (f" and {together - 1} more" if together > 1 else "")
                for protocol, attack, defence in itertools.product(self.protocols, self.attacks, self.defences):
                    shown = ("none", None) if defence is None else (defence["name"], defence["strength"])
                    axes = (*network, name, size, clients, protocol, _named(attack), *shown)
                    spec = {
                        "version": VERSION,
                        "target": target,
                        "pictures": pictures,
                        "labels": list(labels[at : at + together]),
                        "clients": clients,
                        "protocol": self.protocols[protocol],
                        "attack": attack,
                        "defence": None if defence is None else {**defence, "seed": self.spec["noise-seed"] + at},
                    }
                    yield Job(dict(zip(AXES, axes, strict=True)), spec)

    def _loss(self, model: Mapping[str, Any]) -> Loss:
        """By its name, or what fits the model's outputs."""
        shape = tuple(model["input-shape"])
        try:
            return losses.for_model(make(model["name"], shape, self.spec["seeds"][0], None), shape, model["loss"])
        except ValueError as error:
            raise PlanError(f"models: {model['name']}: {error}") from error

    def _weights(self, path: str) -> bytes:
        """The tensors of a file of weights, as safetensors.

        Raises:
            ReadError: it cannot be read; says why.
        """
        return to_bytes({name: t.contiguous() for name, t in reading.tensors(self.folder / path).items()})

    def supplies(self) -> Supplies:
        """What the specifications of the jobs name and do not hold: pictures and weights."""
        found = Supplies()
        for model in self.models:
            images = self.pictures[tuple(model["input-shape"])]
            for inputs in images.inputs:
                found.pictures[digest(inputs)] = inputs
            if max(self.spec["stages"]):
                labels = torch.tensor(data.labels(images, self._loss(model)))
                found.training[digest(images.inputs)] = (images.inputs, labels)
            if model["weights"] is not None:
                content = self._weights(model["weights"])
                found.weights[sha256(content)] = content
        return found

    def __str__(self) -> str:
        return canonical(dict(self.spec))


def _tables(entries: Sequence[Any], key: str) -> list[dict[str, Any]]:
    """Entries of a list, of which a text stands for a table with this one field."""
    return [{key: each} if isinstance(each, str) else dict(each) for each in entries]


def _source(name: str) -> str | None:
    """SHA-256 over the file that a model of your own comes from: with other code it is another model.

    Raises:
        ModelError: there is none by this name.
    """
    module, colon, _ = name.partition(":")
    if not colon:
        return None
    path = getattr(sys.modules[module], "__file__", None)  # imported when the plan was checked
    return None if path is None else sha256(Path(path).read_bytes())


def _shown(protocol: Mapping[str, Any]) -> str:
    """A protocol in words, such as ``difference, local-steps 4``."""
    return ", ".join([protocol["sends"], *(f"{name} {value}" for name, value in protocol.items() if name != "sends")])


def _named(attack: Mapping[str, Any]) -> str:
    """An attack's name with the sizes that the plan gives it."""
    sizes = [f"{name} {attack[name]}" for name in ("iterations", "restarts") if attack[name] is not None]
    return ", ".join([attack["name"], *sizes, *(["polished"] if attack["polish"] else [])])


def digest(inputs: Tensor) -> str:
    """SHA-256 over the values of pictures."""
    values = inputs.contiguous().numpy()
    return sha256(f"{values.shape} {values.dtype}".encode() + values.tobytes())
