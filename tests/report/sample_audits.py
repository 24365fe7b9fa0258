"""Audits to make reports from: real photographs, noisy copies as their reconstructions, made-up numbers.

Run as a script, it writes them and their reports into a folder, to look at.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rgap import report
from rgap.data import photographs

Audit = dict[str, Any]


def png(picture: Tensor) -> str:
    """A picture (channels, height, width) in [0, 1] as base64 text."""
    values = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def layer(name: str, unknowns: int, gradient: int, weight: int, rank: int | None, virtual: int = 0) -> Audit:
    return {
        "name": name, "unknowns": unknowns, "gradient_rows": gradient, "weight_rows": weight, "virtual_rows": virtual,
        "index": unknowns - gradient - weight - virtual, "rank": rank,
        "free": None if rank is None else unknowns - rank,
    }  # fmt: skip


def solved(name: str, unknowns: int, weight: int, gradient: int, rank: int, condition: float, **other: Any) -> Audit:
    return {
        "name": name, "unknowns": unknowns, "weight_rows": weight, "gradient_rows": gradient, "rank": rank,
        "free": unknowns - rank, "condition": condition, "weight_residual": 3e-7, "gradient_residual": 1e-6,
        "error": condition * 6e-8, "dead_units": 0, "method": "least squares", "open_since": None,
    } | other  # fmt: skip


def result(attack: str, truth: Tensor | None, noise: float | None, seed: int, **other: Any) -> Audit:
    """A result whose reconstruction is the truth and so much noise; None: nothing came back."""
    generator = torch.Generator().manual_seed(seed)
    found = None if truth is None or noise is None else truth + noise * torch.randn(truth.shape, generator=generator)
    mse = None if found is None or truth is None else float(((found - truth) ** 2).mean())
    psnr = None if not mse else -10 * math.log10(mse)
    return {
        "attack": attack, "status": "not converged", "reason": "", "psnr": psnr,
        "ssim": None if psnr is None else max(0.02, min(1.0, (psnr - 5) / 35)), "mse": mse, "best_mse": mse,
        "gradient_residual": 1e-6 if (noise or 1) < 0.01 else 0.2, "error": None, "seconds": 0.4 + seed % 7 / 10,
        "labels": [-1.0], "labels_right": True, "twins": 0, "picture": None if found is None else png(found),
        "assumptions": [], "warnings": [], "layers": [], "joint": None,
    } | other  # fmt: skip


def rich(count: int = 8) -> Audit:
    """An audit in which everything occurs."""
    return copy.deepcopy(_rich(count))


@cache
def _rich(count: int) -> Audit:
    available = photographs(min(count, 25), size=32)
    rank_layers = [
        layer("conv1", 3072, 900, 3468, 3072), layer("conv2", 3468, 3600, 2304, 3468),
        layer("conv3", 2304, 5400, 2304, 2304), layer("conv4", 2304, 5400, 2304, 2304),
        layer("conv5", 2304, 5400, 1024, 2100, 64), layer("fc1", 1024, 1024, 1, 1024),
    ]  # fmt: skip
    samples = []
    for at in range(count):
        truth, name = available.inputs[at % len(available)], available.names[at % len(available)]
        level = ["exact", "exact", "exact", "recognisable", "exact", "not recovered"][at % 6]
        noise = {"exact": 2e-5 * (1 + at), "recognisable": 0.06, "not recovered": 0.4}[level]
        layers = [
            solved("fc1", 1024, 1, 1024, 1024, 1.0),
            solved("conv5", 2304, 1024, 5400, 2304, 40.0 + at),
            solved("conv1", 3072, 3468, 900, 3072 if level == "exact" else 2990, 310.0 * (1 + at), dead_units=at % 3),
        ]
        closed = result(
            "Closed", truth, noise, at, layers=layers,
            status={"exact": "exact", "recognisable": "rank-deficient", "not recovered": "ill-conditioned"}[level],
            reason={"exact": "one input reproduces the gradient, and the constraints determine it"}.get(
                level, "82 dimensions of conv1's input stay free; the smoothest picture is shown"
            ),
            error=9e-6 if level == "exact" else None, twins=2 if at == 3 else 0,
            warnings=[] if level == "exact" else ["conv1: its constraints are nearly dependent"],
            joint={"layers": ["conv1", "conv2"], "unknowns": 3072, "rows": 6804, "rank": 2990, "free": 82,
                   "condition": 2.4e7, "steps": 14, "converged": True, "prior": "smoothness"} if at == 3 else None,
        )  # fmt: skip
        samples.append(
            {
                "name": f"{name}.png" if at < 25 else f"{name}-{at}.png", "label": [-1.0, 1.0][at % 2],
                "picture": png(truth), "best": "Closed", "level": level,
                "results": [
                    closed,
                    result("Matching", truth, 0.11 + at / 100, at + 100, status="reproduced", seconds=84.0,
                           reason="300 steps of L-BFGS; the gradient fits to 2 parts in 10",
                           assumptions=["pictures are smooth (total variation 1e-4)"], labels_right=at != 2),
                    result("Fading", truth, None, at, status="gradient zero", reason="a layer holds nothing",
                           labels=None, labels_right=None, gradient_residual=None),
                ],
            }
        )  # fmt: skip

    def point(strength: float, psnr: float, error: float, epsilon: float | None = None) -> Audit:
        return {
            "strength": strength, "median_psnr": psnr, "median_ssim": max(0.0, min(1.0, (psnr - 5) / 35)),
            "recovered": max(0.0, min(1.0, (psnr - 18) / 20)), "gradient_error": error, "epsilon": epsilon,
        }  # fmt: skip

    exact = sum(sample["level"] == "exact" for sample in samples)
    seen = sum(sample["level"] != "not recovered" for sample in samples)
    return {
        "format": 2, "kind": "rgap-audit", "complete": True,
        "made": {"rgap": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "date": "2026-11-25T03:00:00+00:00",
                 "seconds": 712.3, "command": f"rgap audit --model cnn6 --loss logistic --count {count} --seed 0 "
                 "--attacks all --defences all --out rgap-out"},
        "target": {
            "model": "cnn6", "loss": "logistic", "input_shape": [3, 32, 32], "value_range": [0.0, 1.0], "batch_size": 1,
            "fingerprint": "6f1b2c4d8e0a93757c9b1f2e4d6a8c0b1e3f5a7d9c2b4e6f8a0c1d3e5b7f9a2c", "parameters": 123456,
            "layers": [
                "conv1: [3, 32, 32] -> [12, 17, 17], leaky_relu(0.2)",
                "conv2: [12, 17, 17] -> [36, 8, 8], leaky_relu(0.2)",
                "conv3: [36, 8, 8] -> [36, 8, 8], leaky_relu(0.2)", "conv4: [36, 8, 8] -> [36, 8, 8], leaky_relu(0.2)",
                "conv5: [36, 8, 8] -> [64, 4, 4], leaky_relu(0.2)", "fc1: [1024] -> [1]",
            ],
            "obstacles": [],
        },
        "protocol": {"sends": "gradient", "steps": 1, "learning_rate": None, "optimiser": "sgd", "summed": False,
                     "clients": 1},
        "settings": {"seed": 0, "samples": count, "data": "built-in photographs", "budget": None},
        "verdict": {
            "level": "exact",
            "headline": "Most pictures can be read out of the updates, exactly.",
            "sentences": [
                f"{exact} of {count} pictures came back exactly, and {seen} of {count} are recognisable.",
                "Anyone who sees one client's update can do this on a laptop in under a second for each picture. "
                "They need the model that the server sent out, and nothing else.",
            ],
            "layer": {"name": "conv1", "role": "gives away",
                      "why": "it has 4,368 constraints on 3,072 unknowns, so its input is determined; every layer "
                      "after it passes on what it needs to know."},
            "advice": [
                {"what": "Add Gaussian noise of 0.001 to what is sent.", "why": "It is the weakest noise at which no "
                 "picture was recognisable, and training pays 30% of the gradient's length for it.",
                 "tried": True, "before": {"psnr": 92.4, "recovered": 0.875}, "after": {"psnr": 9.3, "recovered": 0.0},
                 "cost": {"gradient_error": 0.3, "epsilon": 41.0}},
                {"what": "Halve the channels of conv1.", "why": "With 6 channels it would have 2,184 constraints on "
                 "3,072 unknowns, and 888 dimensions would stay free.",
                 "tried": False, "before": None, "after": None, "cost": None},
            ],
            "limits": [
                "A picture counts as recognisable from an SSIM of 0.5 or a PSNR of 20 dB on.",
                f"{count} samples were tried; others may fare worse.",
                "The attacks knew the model's weights, as a server does.",
            ],
        },
        "rank": {"index": -360, "joint_free": 0, "layers": rank_layers,
                 "sentence": "Each layer but conv5 has at least as many independent constraints as unknowns, so the "
                 "input follows from the gradient layer by layer."},
        "attacks": [
            {"name": "Closed", "applies": True, "reason": "", "exact": exact, "recognisable": seen, "samples": count,
             "median_psnr": 91.2, "median_seconds": 0.7},
            {"name": "Matching", "applies": True, "reason": "", "exact": 0, "recognisable": 2, "samples": count,
             "median_psnr": 17.3, "median_seconds": 84.0},
            {"name": "Fading", "applies": True, "reason": "", "exact": 0, "recognisable": 0, "samples": count,
             "median_psnr": None, "median_seconds": 0.1},
            {"name": "Bias", "applies": False, "reason": "no Linear layer with a bias reads the input", "exact": None,
             "recognisable": None, "samples": None, "median_psnr": None, "median_seconds": None},
        ],
        "samples": samples,
        "defences": [
            {"name": "GaussianNoise", "strength": "deviation", "about": "Adds normal noise to each value that is sent.",
             "points": [point(0.0, 92.4, 0.0), point(1e-6, 74.0, 3e-4, 41000.0), point(1e-5, 55.0, 3e-3, 4100.0),
                        point(1e-4, 33.0, 0.03, 410.0), point(1e-3, 9.3, 0.3, 41.0), point(1e-2, 5.1, 3.0, 4.1)],
             "closes_at": 1e-3, "sentence": "From 0.001 on no picture is recognisable."},
            {"name": "Pruning", "strength": "share set to zero", "about": "Sends only the largest values.",
             "points": [point(0.1, 48.0, 0.01), point(0.3, 31.0, 0.06), point(0.5, 26.5, 0.12), point(0.7, 22.0, 0.27),
                        point(0.9, 20.5, 0.55)],
             "closes_at": None, "sentence": "At no share tried does it close the leak."},
        ],
        "not_run": ["Clipping was not swept: it does not change what is determined.",
                    "Batches of more than one sample were left out: there was no time for them."],
    }  # fmt: skip


def partial() -> Audit:
    """Interrupted after three samples."""
    audit = rich(3)
    return audit | {
        "complete": False,
        "settings": audit["settings"] | {"samples": 8, "budget": 60.0},
        "defences": [audit["defences"][0] | {"points": [], "closes_at": None, "sentence": ""}],
        "not_run": ["5 samples: the audit was interrupted."],
    }


def empty() -> Audit:
    """The least that an audit can hold."""
    audit = rich(1)
    return audit | {
        "complete": False,
        "made": audit["made"] | {"command": None, "seconds": None},
        "target": audit["target"] | {"value_range": None, "layers": [], "obstacles": [], "input_shape": []},
        "verdict": {
            "level": "nothing sent", "headline": "The updates hold nothing.", "sentences": [], "layer": None,
            "advice": [], "limits": [],
        },
        "rank": None, "attacks": [], "samples": [], "defences": [], "not_run": [],
    }  # fmt: skip


def closed() -> Audit:
    """Nothing came back, from inputs that are no pictures."""
    audit = rich(2)
    for at, sample in enumerate(audit["samples"]):
        sample.update(
            name=f"row {at}", picture=None, level="not recovered", best=None if at else "Bias",
            results=[] if at else [result("Bias", None, None, 1, status="not converged", mse=0.4, reason="no fit")],
        )  # fmt: skip
    return audit | {
        "protocol": {"sends": "difference", "steps": 5, "learning_rate": 0.1, "optimiser": "sgd", "summed": True,
                     "clients": 10},
        "target": audit["target"] | {"input_shape": [40], "obstacles": ["bn1: batch norm in training mode"]},
        "rank": None,
        "verdict": audit["verdict"] | {
            "level": "not recovered", "headline": "No attack that was tried recovered a sample.",
            "sentences": ["0 of 2 samples came back."],
            "layer": {"name": "bn1", "role": "protects", "why": "it mixes the samples of a batch."}, "advice": [],
        },
        "defences": [],
    }  # fmt: skip


HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>'",
    "holiday\u202egnp.exe",
    "\ud83d\x00\udc80",
    "x" * 10_000,
    "</style></title><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "صورة",
]
"""Names that somebody might give a file."""


def hostile() -> Audit:
    """An audit in which every name is out to do harm."""
    audit = rich(len(HOSTILE))
    for sample, name in zip(audit["samples"], HOSTILE, strict=True):
        sample["name"] = name
        sample["best"] = sample["results"][0]["attack"] = name
        sample["results"][0] |= {"reason": name, "warnings": [name], "status": name}
        sample["results"][0]["layers"][0]["name"] = name
    script = HOSTILE[0]
    audit["target"] |= {"model": HOSTILE[2] + script, "layers": [script], "obstacles": [script]}
    audit["verdict"] |= {"headline": f"The pictures of {script}", "sentences": HOSTILE}
    audit["attacks"][0]["name"] = audit["attacks"][3]["name"] = HOSTILE[1]
    audit["defences"][0] |= {"name": HOSTILE[5], "strength": HOSTILE[4]}
    audit["rank"]["layers"][0]["name"] = HOSTILE[4]
    audit["settings"]["data"] = HOSTILE[4]
    return audit


AUDITS = {
    "rich": rich,
    "partial": partial,
    "empty": empty,
    "closed": closed,
    "hostile": hostile,
    "many": lambda: rich(200),
}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for title, make in AUDITS.items():
        (folder / f"{title}.json").write_text(json.dumps(make(), allow_nan=False))
        report.write(folder / f"{title}.json", folder / f"{title}.html")
