from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import ACTIVATIONS, clients
from torch import nn

from rgap import Target, losses, models
from rgap.nn.chain import NotAChain
from rgap.rank import LayerRank, Measured, estimated, measured, plot, rank_analysis
from rgap.rank import analysis as analysing

# Not a package: a script that stands beside the tests.
_spec = importlib.util.spec_from_file_location(
    "architectures", Path(__file__).parents[1] / "reproductions" / "architectures.py"
)
assert _spec is not None
assert _spec.loader is not None
architectures = importlib.util.module_from_spec(_spec)
sys.modules["architectures"] = architectures
_spec.loader.exec_module(architectures)

CIFAR = (3, 32, 32)


def target(*layers: nn.Module, shape: tuple[int, ...] = CIFAR, batch_size: int = 1) -> Target:
    """Layers, and a Linear layer to one output."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(*layers, nn.Flatten())
        for module in body:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        width = body(torch.zeros(1, *shape)).numel()
        net = nn.Sequential(*body, nn.Linear(width, 1, bias=False))
    return Target(net, losses.Logistic(), shape, batch_size=batch_size)


def conv(*arguments: int, **named: int) -> nn.Module:
    return nn.Conv2d(*arguments, bias=False, **named)


def leaky() -> nn.Module:
    return nn.LeakyReLU(0.2)


# Published numbers: Figure 2 and Table 2 of the paper.


@pytest.mark.parametrize(("build", "index"), architectures.NETWORKS)
def test_network_indices_are_the_published_ones(build, index):
    analysis = rank_analysis(Target(build(0), losses.Logistic(), CIFAR), measure=False)
    assert analysis.index == index
    assert analysis.critical.index == index


def test_counts_of_the_two_networks_whose_second_layer_is_critical():
    third = rank_analysis(Target(architectures.full_rank_by_virtual(), losses.Logistic(), CIFAR), measure=False)
    second = third.layers[1]
    counts = (second.unknowns, second.gradient_rows, second.weight_rows, second.virtual_rows)
    assert counts == (3600, 144, 3136, 528)
    assert (second.own_index, second.index) == (320, -208)
    fifth = rank_analysis(Target(architectures.deficient_second(), losses.Logistic(), CIFAR), measure=False)
    second = fifth.layers[1]
    counts = (second.unknowns, second.gradient_rows, second.weight_rows, second.virtual_rows)
    assert counts == (3136, 256, 2500, 64)
    assert (second.own_index, second.index) == (380, 316)


def test_published_networks_repeat_with_their_seed_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    first, again, other = (architectures.full_rank(seed).conv1.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


# Measured ranks that differ from the count, each known from overlap: min(c_out, T) * min(c_out, P).


def test_overlap_costs_dimensions_that_counting_misses():
    analysis = rank_analysis(Target(architectures.deficient_first(), losses.Logistic(), CIFAR))
    first = analysis.layers[0]
    assert (first.index, first.free, first.rank) == (405, 405 + 9, 3072 - 414)
    assert [layer.free for layer in analysis.layers[1:]] == [0, 0]
    assert analysis.joint_free == 414
    assert analysis.protecting is first
    assert analysis.verdict.startswith("conv1 protects the input: 414 of its 3072 dimensions")


def test_a_gap_of_the_second_layer_reaches_the_input_in_part():
    analysis = rank_analysis(Target(architectures.deficient_second(), losses.Logistic(), CIFAR))
    assert [layer.free for layer in analysis.layers] == [0, 380 + 16, 0, 0]
    assert 36 <= analysis.joint_free <= 38
    assert analysis.protecting is analysis.layers[1]
    assert analysis.verdict.startswith("conv2 protects the input: 3")


def test_virtual_constraints_close_the_gap_of_the_second_layer():
    analysis = rank_analysis(Target(architectures.full_rank_by_virtual(), losses.Logistic(), CIFAR))
    assert [layer.free for layer in analysis.layers] == [0, 320 + 16, 0, 0]
    assert analysis.joint_free == 0
    assert analysis.protecting is None


def test_cnn6_is_of_full_rank():
    analysis = rank_analysis(Target(models.cnn6(), losses.Logistic(), CIFAR))
    assert {layer.free for layer in analysis.layers} == {0}
    assert {layer.measured for layer in analysis.layers} == {Measured.EXACT}
    assert analysis.verdict.startswith("No layer protects the input: the constraints of every layer")


def test_cnn6_d_misses_dimensions_where_the_paper_counts_enough():
    analysis = rank_analysis(Target(models.cnn6_d(), losses.Logistic(), CIFAR))
    second = analysis.layers[1]
    assert (second.own_index, second.free, second.joint_free) == (-312, 280, 280)
    assert [layer.free for layer in analysis.layers if layer is not second] == [0] * 6
    assert analysis.joint_free == 0
    assert analysis.leaky == (second,)
    assert "conv2 leaves 280 of its 3468 inputs free" in analysis.verdict
    assert "stops the recursion" in analysis.verdict


# Against dense matrices built column by column.


def columns(linear, shape: tuple[int, ...]) -> torch.Tensor:
    """The matrix of a linear map on tensors of a shape."""
    size = torch.Size(shape).numel()
    units = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    return torch.stack([linear(unit).flatten() for unit in units], 1)


def free_of(matrix: torch.Tensor) -> int:
    """Columns less rank, rows scaled to norm 1."""
    norm = matrix.norm(dim=1, keepdim=True)
    matrix = matrix[norm[:, 0] > 0] / norm[norm[:, 0] > 0]
    if not len(matrix):
        return matrix.shape[1]
    sigma = torch.linalg.svdvals(matrix)
    return matrix.shape[1] - int((sigma > 1e-7 * sigma[0]).sum())


def dense(aim: Target, batch: torch.Tensor, last: torch.Tensor) -> tuple[list[int], list[int]]:
    """Free dimensions of every layer's input, alone and with all later layers, from torch's own derivatives."""
    chain = aim.chain
    inputs, outputs = chain.forward(chain[0].pack_input(batch))
    slopes = [layer.activation.slope(z) for layer, z in zip(chain, outputs, strict=True)]
    k = chain.backward(last, slopes)
    alone, together = [], []
    later = None
    for depth in reversed(range(len(chain))):
        layer = chain[depth]
        shape = inputs[depth].shape
        gradient = columns(lambda x, d=depth: chain[d].grad_weight(x, k[d]).sum(0), shape)
        weight = columns(layer.output, shape)
        known = slopes[depth].flatten() > 0
        alone.insert(0, free_of(torch.cat([gradient, weight[known]])))
        if later is None:
            later = torch.cat([gradient, weight])
        else:
            after = chain[depth + 1]

            def step(x, layer=layer, slope=slopes[depth], after=after):
                return after.pack_input(layer.unpack_output(layer.output(x) * slope))

            later = torch.cat([gradient, later @ columns(step, shape)])
        # Orthonormal rows: the span counts, not how small the slopes made it.
        _, sigma, basis = torch.linalg.svd(later / later.norm(dim=1, keepdim=True).clamp(min=1e-300))
        later = basis[: int((sigma > 1e-7 * sigma[0].clamp(min=1e-300)).sum())]
        together.insert(0, later.shape[1] - len(later))
    return alone, together


@settings(max_examples=40, deadline=None)
@given(client=clients(), seed=st.integers(0, 2**16), batch=st.sampled_from([1, 1, 2, 3]))
def test_measured_ranks_are_those_of_dense_matrices(client, seed, batch):
    assume(batch * max(layer.unknowns for layer in client.target.chain) <= 400)
    generator = torch.Generator().manual_seed(seed)
    sample = torch.rand(batch, *client.target.input_shape, generator=generator, dtype=torch.float64)
    analysis = rank_analysis(client.target, sample, seed=seed)
    last = torch.randn(batch, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    alone, together = dense(client.target, sample, last)
    assert [layer.free for layer in analysis.layers] == alone
    assert [layer.joint_free for layer in analysis.layers] == together
    assert {layer.measured for layer in analysis.layers} == {Measured.EXACT}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("outputs", [2, 3, 8])
def test_the_bound_from_patches_is_met_where_patches_do_not_overlap(stride, outputs, monkeypatch):
    aim = target(conv(2, outputs, stride, stride), leaky(), shape=(2, 6, 6))
    exact = rank_analysis(aim).layers[0]
    monkeypatch.setattr(measured, "LARGEST_GRAM", 0)
    monkeypatch.setattr(measured, "LARGEST_KERNEL", 0)
    by_formula = rank_analysis(aim).layers[0]
    assert by_formula.method == "patches that do not overlap"
    assert by_formula.measured is Measured.EXACT
    assert by_formula.free == exact.free


@pytest.mark.parametrize(("depth", "build"), [(1, models.cnn6_d), (0, architectures.deficient_first)])
def test_estimates_are_as_near_as_they_say(depth, build, monkeypatch):
    aim = Target(build(), losses.Logistic(), CIFAR)
    k, slopes = analysing._signals(aim, 1, None, torch.Generator().manual_seed(0))
    rows = measured.rows(aim.chain[depth], k[depth], slopes[depth])
    expected = {1: 280, 0: 414}[depth]
    for seed in range(3):
        found = estimated.estimate(rows, torch.Generator().manual_seed(seed))
        assert 0 < found.error < 40
        assert abs(found.count - expected) <= found.error
        assert not found.exact
    monkeypatch.setattr(estimated, "WORK", 0)
    found = estimated.estimate(rows, torch.Generator().manual_seed(0))
    assert "stopped after 1 steps" in found.method
    assert abs(found.count - expected) <= found.error


def test_too_large_layers_are_estimated_and_say_so(monkeypatch):
    monkeypatch.setattr(measured, "LARGEST_GRAM", 0)
    full = rank_analysis(target(conv(3, 4, 3), leaky(), shape=(3, 9, 9)))
    assert full.layers[0].measured is Measured.ESTIMATED
    assert (full.layers[0].free, full.layers[0].error, full.joint_free) == (0, 0, 0)
    short = rank_analysis(target(conv(3, 2, 3), leaky(), shape=(3, 9, 9)))
    assert short.layers[0].error > 0
    assert short.joint_free is None
    assert "not decided" in short.verdict
    assert f"{short.layers[0].free}+-{short.layers[0].error}" in str(short)


# Activations, batches, structure.


def test_relu_drops_the_weight_rows_of_inactive_units():
    aim = target(conv(3, 8, 3), nn.ReLU(), shape=(3, 8, 8))
    counted = rank_analysis(aim, measure=False).layers[0]
    assert (counted.weight_rows, counted.expected_weight_rows) == (288, 144)
    assert counted.known_weight_rows is None
    sample = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    analysis = rank_analysis(aim, sample)
    z = aim.chain.forward(sample.reshape(1, 3, 64))[1][0]
    assert analysis.layers[0].known_weight_rows == int((z > 0).sum())
    assert analysis.at_sample
    assert analysis.layers[-1].expected_weight_rows == 1


def test_dead_units_give_no_gradient_rows():
    aim = target(nn.Conv2d(3, 4, 3), nn.ReLU(), shape=(3, 8, 8))
    with torch.no_grad():
        aim.model[0].bias[1:3] = -100.0
    dead = rank_analysis(Target(aim.model, losses.Logistic(), (3, 8, 8))).layers[0]
    assert (dead.gradient_rows, dead.live_gradient_rows) == (108, 54)


def test_a_batch_multiplies_all_but_the_gradient_rows():
    aim = target(conv(3, 12, 3), leaky(), conv(12, 8, 3), leaky(), shape=(3, 8, 8), batch_size=4)
    one, four = rank_analysis(aim, batch_size=1, measure=False), rank_analysis(aim, measure=False)
    assert four.batch_size == 4
    for a, b in zip(one.layers, four.layers, strict=True):
        assert (b.unknowns, b.weight_rows, b.virtual_rows) == (4 * a.unknowns, 4 * a.weight_rows, 4 * a.virtual_rows)
        assert b.gradient_rows == a.gradient_rows
        assert b.index == 4 * (a.index + a.gradient_rows) - a.gradient_rows


def test_residue_classes_of_a_strided_convolution():
    layer = target(conv(1, 1, 3, stride=2), shape=(1, 9, 9)).chain[0]
    found = [(sorted(t.tolist()), len(n)) for t, n in measured.residue_classes(layer)]
    assert found == [([0, 2, 6, 8], 25), ([1, 7], 20), ([3, 5], 20), ([4], 16)]


def test_unread_pixels_stay_free():
    analysis = rank_analysis(target(conv(3, 30, 3, stride=3), leaky(), shape=(3, 8, 8)))
    assert analysis.layers[0].unseen == 3 * (64 - 36)
    assert analysis.joint_free == analysis.layers[0].free == 84
    assert "84 are read by no kernel" in analysis.verdict


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_linear_layers_are_determined_by_their_gradient(activation):
    analysis = rank_analysis(target(nn.Flatten(), nn.Linear(12, 5), ACTIVATIONS[activation](), shape=(3, 2, 2)))
    assert [layer.method for layer in analysis.layers] == [measured.GRADIENT_ALONE] * 2
    assert analysis.joint_free == 0


# What comes out.


def test_everything_is_json():
    for measure in (False, True):
        analysis = rank_analysis(target(conv(3, 2, 3), leaky(), shape=(3, 6, 6)), measure=measure)
        said = analysis.to_dict()
        assert json.loads(json.dumps(said, allow_nan=False)) == said
        assert said["verdict"] == analysis.verdict
        assert said["layers"][0]["index"] == analysis.layers[0].index
        assert said["layers"][0]["measured"] == ("exact" if measure else "not measured")


def test_counting_alone_says_so():
    analysis = rank_analysis(Target(architectures.deficient_first(), losses.Logistic(), CIFAR), measure=False)
    assert analysis.verdict == (
        "By counting, conv1 protects the input: the paper's index is 405. Ranks were not measured."
    )
    assert analysis.joint_free is None
    assert analysis.protecting is None
    assert analysis.layers[0].measured is Measured.NO
    analysis = rank_analysis(Target(models.cnn6(), losses.Logistic(), CIFAR), measure=False)
    assert analysis.verdict.startswith("By counting, no layer protects the input")


def test_the_verdict_tells_where_counting_is_wrong():
    # 3 * 64 unknowns, 54 gradient rows and 144 weight rows: 6 more than needed, of which 4 * 4 overlap.
    aim = target(conv(3, 4, 3), leaky(), shape=(3, 8, 8))
    analysis = rank_analysis(aim)
    first = analysis.layers[0]
    assert first.index < 0
    if analysis.joint_free:
        assert "Counting says otherwise" in analysis.verdict


def test_the_table_can_be_read():
    lines = str(rank_analysis(target(conv(3, 2, 3), leaky(), shape=(3, 6, 6)))).splitlines()
    assert lines[0].split() == ["layer", "|x|", "|W|", "|z|", "|V|", "index", "rank", "free", "joint", "measured"]
    assert len(lines) == 1 + 2 + 2
    assert lines[-1].endswith(".")


def test_the_plot_is_a_picture(tmp_path):
    analysis = rank_analysis(target(conv(3, 2, 3), leaky(), shape=(3, 6, 6)))
    plot(analysis, tmp_path / "rank.png")
    assert (tmp_path / "rank.png").read_bytes().startswith(b"\x89PNG")


def test_progress_hears_of_every_layer_from_the_last():
    heard: list[LayerRank] = []
    analysis = rank_analysis(target(conv(3, 2, 3), leaky(), shape=(3, 6, 6)), progress=heard.append)
    assert tuple(reversed(heard)) == analysis.layers


def test_the_seed_decides_and_the_global_state_is_left_alone():
    aim = target(conv(3, 6, 3), nn.ReLU(), shape=(3, 6, 6))
    before = torch.get_rng_state()
    assert rank_analysis(aim, seed=1) == rank_analysis(aim, seed=1)
    known = {rank_analysis(aim, seed=seed).layers[0].known_weight_rows for seed in range(4)}
    assert len(known) > 1
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_arguments_are_refused():
    aim = target(conv(3, 2, 3), leaky(), shape=(3, 6, 6))
    with pytest.raises(ValueError, match=r"got a sample of shape \(3, 6, 6\), expected \(b, 3, 6, 6\).*sample\[None\]"):
        rank_analysis(aim, torch.zeros(3, 6, 6))
    with pytest.raises(ValueError, match="got batch_size 0: expected 1 or more"):
        rank_analysis(aim, batch_size=0)
    with pytest.raises(ValueError, match=r"got batch_size 2 and 1 sample\(s\)"):
        rank_analysis(aim, torch.zeros(1, 3, 6, 6), batch_size=2)
    with pytest.raises(NotAChain):
        rank_analysis(target(conv(3, 2, 3), nn.MaxPool2d(2), shape=(3, 6, 6)))


def test_counting_a_deep_chain_at_full_resolution_takes_no_time():
    layers: list[nn.Module] = [conv(3, 64, 7, stride=2, padding=3), leaky()]
    for width, blocks in ((64, 4), (128, 4), (256, 4), (512, 4)):
        for block in range(blocks):
            before = layers[-2].out_channels
            layers += [conv(before, width, 3, stride=2 if block == 0 else 1, padding=1), leaky()]
    aim = target(*layers, shape=(3, 224, 224))
    start = time.perf_counter()
    analysis = rank_analysis(aim, measure=False)
    assert time.perf_counter() - start < 5
    assert analysis.layers[0].unknowns == 3 * 224 * 224
    assert analysis.layers[0].weight_rows == 64 * 112 * 112
