"""A plan is the product of its lists, and its jobs are named by what they depend on."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from small_plans import home, spec_of

from rgap import data, models
from rgap.models.named import BUILT_IN, ONE_WIDTH, ModelError, built_in
from rgap.sweeps import Plan, PlanError
from rgap.sweeps.job import AXES

WHOLE = """
models = ["fcn3", {name = "cnn6", loss = "hinge"}]
seeds = [1, 2]
stages = [0, 3]
batch-sizes = [1, 2]
protocols = ["gradient", {sends = "difference", learning-rate = 0.1, local-steps = 3}]
attacks = ["recursive", {name = "dlg", iterations = 7, polish = true}]
defences = ["none", "top-k", {name = "GaussianNoise", strengths = [1e-3, 1]}]
input-shape = [1, 16, 16]
[images]
count = 2
[training]
rate = 0.01
images = 4
"""


def keys(plan: Plan) -> list[str]:
    return [job.key for job in plan.jobs()]


def test_the_jobs_are_the_product(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(WHOLE)
    plan = Plan.load(tmp_path / "plan.toml")
    jobs = list(plan.jobs())
    first, second = data.photographs(2, size=16, channels=1).names
    batches = [(first, 1), (second, 1), (f"{first} and 1 more", 2)]
    protocols = ("gradient", "difference, learning-rate 0.1, local-steps 3")
    defences = [("none", None), ("TopK", 0.1), ("GaussianNoise", 1e-3), ("GaussianNoise", 1.0)]
    expected = [
        (model, seed, None, stage, *batch, 1, protocol, attack, *defence)
        for model, seed, stage, batch, protocol, attack, defence in itertools.product(
            ("fcn3", "cnn6"), (1, 2), (0, 3), batches, protocols, ("recursive", "dlg, iterations 7, polished"), defences
        )
    ]
    assert [tuple(job.axes[name] for name in AXES) for job in jobs] == expected
    assert len({job.key for job in jobs}) == len(jobs) == 2 * 2 * 2 * 3 * 2 * 2 * 4
    assert {job.spec["target"]["loss"] for job in jobs} == {"logistic", "hinge"}
    assert {tuple(job.spec["labels"]) for job in jobs} == {(-1.0,), (1.0,), (-1.0, 1.0)}
    # Training belongs to what a trained network depends on, and to nothing else.
    assert {job.spec["target"]["training"] is None for job in jobs if job.axes["stage"] == 0} == {True}
    assert {job.spec["target"]["training"]["rate"] for job in jobs if job.axes["stage"]} == {0.01}


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_job_keeps_its_name_in_every_plan(draw: st.DataObject) -> None:
    """Lists in another order, or longer, hold the same jobs."""
    seeds = draw.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
    more = draw.draw(st.permutations(seeds + draw.draw(st.lists(st.integers(10, 19), max_size=2, unique=True))))
    base: dict[str, Any] = {"models": ["fcn3"], "attacks": ["bias"], "input-shape": [1, 4, 4], "images": {"count": 1}}
    small = Plan.of({**base, "seeds": seeds})
    large = Plan.of({**base, "seeds": more, "attacks": ["recursive", "bias"], "images": {"count": 2}})
    assert set(keys(small)) <= set(keys(large))
    assert len(set(keys(large))) == len(more) * 2 * 2


@pytest.mark.parametrize(
    "changed",
    [
        {"seeds": [1]},
        {"stages": [1]},
        {"widths": [7]},
        {"loss": "hinge"},
        {"value-range": [0, 2]},
        {"value-range": "none"},
        {"attacks": [{"name": "bias", "polish": True}]},
        {"defences": ["sign"]},
        {"batch-sizes": [2], "images": {"count": 2}},
        {"clients": [2], "images": {"count": 2}},
        {"protocols": [{"sends": "difference", "learning-rate": 0.1}]},
        {"protocols": [{"sends": "gradient", "summed": True}]},
    ],
    ids=str,
)
def test_whatever_a_result_depends_on_makes_another_job(
    changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert set(keys(Plan.of(spec_of()))).isdisjoint(keys(Plan.of(spec_of(**changed))))


def test_what_the_noise_is_drawn_from_belongs_to_a_defended_job() -> None:
    base = {"models": ["fcn3"], "attacks": ["bias"], "input-shape": [1, 4, 4]}
    plain, noisy = ({**base, "defences": [name]} for name in ("none", "GaussianNoise"))
    assert keys(Plan.of(plain)) == keys(Plan.of({**plain, "noise-seed": 5}))
    assert set(keys(Plan.of(noisy))).isdisjoint(keys(Plan.of({**noisy, "noise-seed": 5})))


def test_other_code_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "small_sweep_models", raising=False)
    before = keys(Plan.of(spec_of()))
    path = tmp_path / "small_sweep_models.py"
    path.write_text(path.read_text() + "\n# changed\n")
    assert set(before).isdisjoint(keys(Plan.of(spec_of())))


def test_pictures_and_weights_are_named_by_their_values(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 30).save(tmp_path / "a.png")
    Image.new("L", (4, 4), 60).save(tmp_path / "b.png")
    base = {"models": ["fcn3"], "attacks": ["bias"], "input-shape": [1, 4, 4]}
    one = Plan.of({**base, "images": {"data": ".", "count": 1}}, tmp_path)
    both = Plan.of({**base, "images": {"data": ".", "count": 2}}, tmp_path)
    assert len(set(keys(both)) - set(keys(one))) == 1
    (tmp_path / "a.png").rename(tmp_path / "z.png")
    renamed = Plan.of({**base, "images": {"data": ".", "count": 2}}, tmp_path)
    values = [{name for job in plan.jobs() for name in job.spec["pictures"]} for plan in (renamed, both)]
    assert values[0] == values[1]
    for name, seed in (("w.safetensors", 3), ("v.safetensors", 4)):
        save_file(dict(models.fcn3(16, seed=seed).state_dict()), tmp_path / name)
    tables = [{"name": "fcn3", "weights": name} for name in ("w.safetensors", "v.safetensors")]
    weighed = Plan.of({**base, "models": tables, "images": {"count": 1}}, tmp_path)
    assert len(set(keys(weighed))) == 2
    assert [job.axes["model"] for job in weighed.jobs()] == ["fcn3, w.safetensors", "fcn3, v.safetensors"]
    needed = {job.spec["target"]["weights"] for job in weighed.jobs()}
    assert set(weighed.supplies().weights) == needed


def test_what_a_plan_says_makes_the_same_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(WHOLE)
    plan = Plan.load(tmp_path / "plan.toml")
    again = Plan.of(plan.spec, tmp_path)
    assert again == plan
    assert keys(again) == keys(plan)


def test_all_strengths_of_a_defence() -> None:
    from rgap.defences import Quantise

    plan = Plan.of({"models": ["fcn3"], "attacks": ["bias"], "defences": [{"name": "quantise", "strengths": "all"}]})
    assert tuple(each["strength"] for each in plan.defences if each) == Quantise.levels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models = [", "not TOML"),
        ('models = ["fcn3"]', "'attacks' is a required property"),
        ('models = ["fcn3"]\nattacks = ["bias"]\nseed = [1]', "'seed' was unexpected"),
        ('models = []\nattacks = ["bias"]', "models: "),
        ('models = ["fcn3"]\nattacks = ["bias"]\nseeds = [1.5]', "seeds[0]: 1.5 is not of type 'integer'"),
        ('models = ["fcn3"]\nattacks = ["bias"]\nstages = [-1]', "stages[0]: -1 is less than the minimum"),
        ('models = ["vgg99"]\nattacks = ["bias"]', "got the model 'vgg99', expected cnn6, "),
        ('models = ["no_such_package:make"]\nattacks = ["bias"]', "cannot import no_such_package"),
        ('models = ["rgap.models:nothing"]\nattacks = ["bias"]', "rgap.models has no nothing"),
        ('models = ["lenet"]\nattacks = ["bias"]\nwidths = [3]', "lenet has one width"),
        ('models = ["fcn3"]\nattacks = ["brute-force"]', "got the attack 'brute-force', expected one of closed"),
        ('models = ["fcn3"]\nattacks = [{name = "bias", iterations = 3}]', "Bias is no attack by optimisation"),
        ('models = ["fcn3"]\nattacks = ["bias"]\ndefences = ["prayer"]', "got the defence 'prayer', expected one of"),
        ('models = ["fcn3"]\nattacks = ["bias"]\ndefences = [{name = "sign", strengths = [2]}]', "either on or off"),
        ('models = ["fcn3"]\nattacks = ["bias"]\nloss = "regret"', "unknown loss 'regret'"),
        ('models = ["fcn3"]\nattacks = ["bias"]\n[images]\ncount = 26', "count is 26, but there are 25"),
        ('models = ["fcn3"]\nattacks = ["bias"]\nbatch-sizes = [4]\nclients = [2]', "expected 8 or more"),
        ('models = ["fcn3"]\nattacks = ["bias"]\nprotocols = [{sends = "difference"}]', "needs a positive one"),
        ('models = ["fcn3"]\nattacks = ["bias"]\nprotocols = [{sends = "post"}]', "protocols[0]"),
        (
            'models = ["fcn3"]\nattacks = ["bias"]\n'
            'protocols = [{sends = "difference", learning-rate = 1, minibatch = 2, drop-last = true}]',
            "got minibatch=2 for a client of 1 samples",
        ),
        ('models = ["fcn3"]\nattacks = ["bias"]\ninput-shape = [16]', "expected (1 or 3, height, width)"),
    ],
)
def test_a_plan_that_makes_no_jobs_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(PlanError) as caught:
        list(Plan.load(path).jobs())
    assert message in str(caught.value)


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path / "plan.toml")


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - set(ONE_WIDTH)))
def test_a_width_makes_a_network_wider(name: str) -> None:
    def size(width: int | None) -> int:
        return sum(p.numel() for p in built_in(name, (3, 16, 16), 0, width).parameters())

    assert size(12) < size(24)


def test_a_width_of_its_own_is_the_network_of_the_paper() -> None:
    ours = built_in("cnn6-d", (3, 16, 16), 5, 20).state_dict()
    theirs = models.cnn6_d(3, 16, seed=5).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ModelError, match="takes square pictures"):
        built_in("cnn6", (3, 16, 8))
