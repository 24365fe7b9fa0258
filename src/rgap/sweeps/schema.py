"""What a plan of a sweep may say, as JSON Schema, and what is taken where it says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rgap.protocol import Optimiser, Sends

_NUMBER: dict[str, Any] = {"type": "number"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 1}
_SEED: dict[str, Any] = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_NONE: dict[str, Any] = {"type": "null"}
"""From Python alone: TOML has no such value."""


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


def _table(required: Sequence[str] = (), **properties: dict[str, Any]) -> dict[str, Any]:
    fields = {name.replace("_", "-"): entry for name, entry in properties.items()}
    return {"type": "object", "required": list(required), "additionalProperties": False, "properties": fields}


_POSITIVE: dict[str, Any] = {"type": "number", "exclusiveMinimum": 0}
_YES: dict[str, Any] = {"type": "boolean"}
_PROTOCOL = _table(
    ("sends",), name=_TEXT, sends={"enum": [each.value for each in Sends]}, local_steps=_COUNT, epochs=_COUNT,
    learning_rate=_POSITIVE, optimiser={"enum": [each.value for each in Optimiser]}, minibatch=_COUNT, drop_last=_YES,
    summed=_YES, momentum=_NUMBER, nesterov=_YES, weight_decay=_NUMBER, proximal=_NUMBER, clip_norm=_POSITIVE,
)  # fmt: skip
"""The options of the command line that say what a client does, by the same names."""
_TARGET = {
    "input_shape": _list(_COUNT),
    "value_range": {"oneOf": [{"const": "none"}, {**_list(_NUMBER), "minItems": 2, "maxItems": 2}]},
    "loss": {"oneOf": [_TEXT, _NONE]},
}
SCHEMA = _table(
    ("models", "attacks"),
    models=_list({"oneOf": [_TEXT, _table(("name",), name=_TEXT, weights=_TEXT, **_TARGET)]}),
    seeds=_list(_SEED),
    widths=_list({"oneOf": [_COUNT, _NONE]}),
    stages=_list({"type": "integer", "minimum": 0}),
    attacks=_list({"oneOf": [_TEXT, _table(
        ("name",), name=_TEXT, iterations=_COUNT, restarts=_COUNT, polish={"type": "boolean"},
    )]}),
    defences=_list({"oneOf": [_TEXT, _table(
        ("name",), name=_TEXT, strengths={"oneOf": [{"const": "all"}, _list(_NUMBER)]},
    )]}),
    batch_sizes=_list(_COUNT),
    clients=_list(_COUNT),
    protocols=_list({"oneOf": [{"const": "gradient"}, _PROTOCOL]}),
    noise_seed=_SEED,
    images=_table(data={"oneOf": [_TEXT, _NONE]}, count=_COUNT),
    training=_table(rate=_POSITIVE, batch=_COUNT, images=_COUNT),
    **_TARGET,
)  # fmt: skip
"""Of a plan, as JSON Schema."""

DEFAULTS: dict[str, Any] = {
    "seeds": [0],
    "widths": [None],
    "stages": [0],
    "defences": ["none"],
    "batch-sizes": [1],
    "clients": [1],
    "protocols": ["gradient"],
    "noise-seed": 0,
    "images": {},
    "training": {},
    "input-shape": [3, 32, 32],
    "value-range": [0.0, 1.0],
    "loss": None,
}
IMAGES = {"data": None, "count": 5}
TRAINING = {"rate": 1e-3, "batch": 16, "images": 25}
