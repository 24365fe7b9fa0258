from __future__ import annotations

import json
import time
from functools import cache

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import ACTIVATIONS, clients
from torch import nn

import rgap
from rgap import Target, losses, models
from rgap.nn import layers
from rgap.nn.obstacles import NotAChain
from rgap.nn.ops import Linear
from rgap.rank import LayerRank, Measured, RankAnalysis, estimated, measured, plot, rank_analysis
from rgap.rank.sequence import layer_sequence
from rgap.rank.summary import summarise
from rgap.reproductions import architectures

CIFAR = (3, 32, 32)


def target(*body: nn.Module, shape: tuple[int, ...] = CIFAR, batch_size: int = 1) -> Target:
    """Layers, and a Linear layer to one output."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(*body, nn.Flatten())
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
    return matrix.shape[1] - rank_of(torch.linalg.svdvals(matrix))


def rank_of(sigma: torch.Tensor) -> int:
    """The singular values that are not zero; a matrix whose rank is a matter of opinion settles nothing."""
    if float(sigma[0]) == 0:
        return 0
    relative = sigma / sigma[0]
    assume(not bool(((relative > 1e-11) & (relative < 1e-4)).any()))
    return int((relative > 1e-7).sum())


def dense(aim: Target, batch: torch.Tensor, last: torch.Tensor) -> tuple[list[int], list[int]]:
    """Free dimensions of every layer's input, alone and with all later layers, from torch's own derivatives."""
    network = aim.network
    at = [number for number, node in enumerate(network.nodes) if isinstance(node.op, Linear)]
    values = network.forward(batch)
    cotangents = network.vjp(values, network.slopes(values), {at[-1] + 1: network.layers[-1].unpack_output(last)})
    chain, k, inputs, behind = network.layers, [], [], []
    for layer, number, after in zip(chain, at, [*at[1:], None], strict=True):
        k.append(layer.pack_output(cotangents[number + 1]))
        inputs.append(layer.pack_input(values[number]))
        between = range(number + 1, number + 1 if after is None else after)

        def run(z, between=between):
            for each in between:
                z = network.nodes[each].op.forward(z)
            return z

        z = values[number + 1]
        slope = torch.autograd.functional.vjp(run, z, torch.ones_like(run(z)))[1]
        behind.append((run, z, layer.pack_output(slope)))
    alone, together = [], []
    later = None
    for depth in reversed(range(len(chain))):
        layer = chain[depth]
        shape = inputs[depth].shape
        gradient = columns(lambda x, d=depth: chain[d].grad_weight(x, k[d]).sum(0), shape)
        weight = columns(layer.output, shape)
        run, z, slope = behind[depth]
        known = slope.flatten() != 0
        alone.insert(0, free_of(torch.cat([gradient, weight[known]])))
        if later is None:
            later = torch.cat([gradient, weight])
        else:
            after = chain[depth + 1]

            def step(x, layer=layer, run=run, z=z, after=after):
                moved = layer.unpack_output(layer.output(x))
                return after.pack_input(torch.func.jvp(run, (z,), (moved,))[1])

            passed = columns(step, shape)
            handed = later @ passed
            # A row that is nothing but rounding must not become one of norm 1 below.
            handed[handed.norm(dim=1) < 1e-13 * passed.norm()] = 0.0
            later = torch.cat([gradient, handed])
        # Orthonormal rows: the span counts, not how small the slopes made it.
        later = later / later.norm(dim=1, keepdim=True).clamp(min=1e-300)
        _, sigma, basis = torch.linalg.svd(later, full_matrices=False)
        later = basis[: rank_of(sigma)]
        together.insert(0, later.shape[1] - len(later))
    return alone, together


@settings(max_examples=12, deadline=None)
@given(client=clients(), seed=st.integers(0, 2**16), batch=st.sampled_from([1, 1, 2, 3]))
def test_measured_ranks_are_those_of_dense_matrices(client, seed, batch):
    assume(batch * max(layer.unknowns for layer in client.target.network.layers) <= 400)
    generator = torch.Generator().manual_seed(seed)
    sample = torch.rand(batch, *client.target.input_shape, generator=generator, dtype=torch.float64)
    analysis = rank_analysis(client.target, sample, seed=seed)
    last = torch.randn(batch, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    alone, together = dense(client.target, sample, last)
    assert [layer.free for layer in analysis.layers] == alone
    assert [layer.joint_free for layer in analysis.layers] == together
    assert {layer.measured for layer in analysis.layers} == {Measured.EXACT}


BETWEEN = {
    "batch norm": lambda: [nn.Conv2d(2, 4, 3), normed(4), nn.ReLU(), nn.Conv2d(4, 5, 2, 2)],
    "batch norm behind": lambda: [nn.Conv2d(2, 6, 3), nn.ELU(), normed(6), nn.Conv2d(6, 2, 3), normed(2)],
    "reordered": lambda: [normed(2), nn.PixelUnshuffle(2), nn.Conv2d(8, 3, 2), nn.PixelShuffle(1), nn.Tanh()],
    "two activations": lambda: [nn.Conv2d(2, 4, 3), nn.LeakyReLU(0.3), nn.ReLU()],
    "gelu": lambda: [nn.Conv2d(2, 3, 3), nn.GELU()],
}
"""What stands between layers and loses nothing but what an activation does."""


def normed(channels):
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        norm.weight.uniform_(-1.5, 1.5)
        norm.bias.normal_()
    return norm


@pytest.mark.parametrize("between", BETWEEN)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**16), batch=st.integers(1, 2))
def test_ranks_are_measured_past_batch_norm_and_reordering(between, batch, seed):
    """Against dense matrices, as those of plain chains are."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        front = nn.Sequential(*BETWEEN[between](), nn.Flatten()).double().eval()
        width = front(torch.zeros(1, 2, 6, 6).double()).shape[1]
        aim = Target(nn.Sequential(front, nn.Linear(width, 1)).double().eval(), losses.Logistic(), (2, 6, 6))
        sample = torch.rand(batch, 2, 6, 6, dtype=torch.float64)
    assert aim.obstacles
    analysis = rank_analysis(aim, sample, seed=5)
    last = torch.randn(batch, 1, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    alone, together = dense(aim, sample, last)
    assert [layer.free for layer in analysis.layers] == alone
    assert [layer.joint_free for layer in analysis.layers] == together
    assert {layer.measured for layer in analysis.layers} == {Measured.EXACT}
    assert analysis.obstacles == ()
    assert "chain" not in str(analysis)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Tanh(), nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 1)),
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 1)),
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(48, 1)),
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(108, 1)),
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Upsample(scale_factor=2), nn.Flatten(), nn.Linear(192, 1)),
    ],
    ids=["in front", "pool", "group norm", "reflected", "upsampled"],
)
def test_what_loses_values_or_adds_some_is_counted_alone(model):
    analysis = rank_analysis(Target(model.eval(), losses.Logistic(), (2, 6, 6)))
    assert {layer.measured for layer in analysis.layers} == {Measured.NO}
    assert analysis.obstacles


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
    generator = torch.Generator().manual_seed(0)
    sample = torch.rand(1, *CIFAR, generator=generator, dtype=torch.float64)
    sequence = layer_sequence(aim)
    k, slopes = sequence.signals(sample, generator)
    rows = measured.rows(sequence[depth], k[depth], slopes[depth])
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
    z = aim.network.forward(sample)[1]
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


@pytest.mark.parametrize(
    ("hidden", "bias", "size", "layer"),
    [
        # Fewer samples than the layer with one output behind it has inputs and the one before it outputs, by which of
        # its units fire: the two last layers tell more apart than the two first ones.
        ((20, 30), False, 19, "fc2"),
        ((40, 12), False, 11, "fc1"),
        ((8, 30), True, 7, "fc2"),
        # A place behind a narrow layer tells more, but the narrow one has no constraints for them.
        ((20, 2, 60, 50, 40), False, 20 * 2 // 18, "fc2"),
        # One hidden layer: by which of its units fire.
        ((20,), False, 19, "fc1"),
    ],
)
def test_the_largest_batch_of_linear_layers_is_counted(hidden, bias, size, layer):
    aim = Target(models.fcn3(64, hidden, bias=bias), losses.Logistic(), (1, 8, 8))
    analysis = rank_analysis(aim, measure=False)
    assert (analysis.largest_batch, analysis.largest_batch_layer) == (size, layer)


@pytest.mark.parametrize(("channels", "size"), [(4, 92 // 128), (8, 152 // 64), (10, 170 // 32), (12, None)])
def test_a_convolution_in_front_ends_the_batch_where_its_constraints_are_shared_by_too_many(channels, size):
    # 192 unknowns and 16 outputs a channel for each sample, 27 gradient rows a channel for all,
    # of which weight rows repeat as many as there are pairs of channels.
    head = nn.Flatten(), nn.Linear(16 * channels, 40, bias=False), leaky(), nn.Linear(40, 30, bias=False), leaky()
    aim = target(conv(3, channels, 3, stride=2, padding=1), leaky(), *head, shape=(3, 8, 8))
    analysis = rank_analysis(aim, measure=False)
    expected = (20, "3") if size is None else (size, "0")
    assert (analysis.largest_batch, analysis.largest_batch_layer) == expected
    assert analysis.to_dict()["largest_batch"] == expected[0]
    told = f"up to a batch of {size or 20}, which {expected[1]} ends" if expected[0] else "no batch comes back"
    assert told in " ".join(analysis.notes)


def test_where_the_closed_form_does_not_pass_the_largest_batch_is_not_known():
    aim = target(conv(1, 4, 3), nn.LayerNorm((4, 6, 6)), nn.LPPool2d(2, 2), shape=(1, 8, 8))
    assert rank_analysis(aim, measure=False).largest_batch is None


def test_residue_classes_of_a_strided_convolution():
    layer = target(conv(1, 1, 3, stride=2), shape=(1, 9, 9)).network.layers[0]
    found = [(sorted(t.tolist()), len(n)) for t, n in measured.residue_classes(layer)]
    assert found == [([0, 2, 6, 8], 25), ([1, 7], 20), ([3, 5], 20), ([4], 16)]


def test_unread_pixels_stay_free():
    analysis = rank_analysis(target(conv(3, 30, 3, stride=3), leaky(), shape=(3, 8, 8)))
    assert analysis.layers[0].unseen == 3 * (64 - 36)
    assert analysis.joint_free == analysis.layers[0].free == 84
    assert "84 are read by no kernel" in analysis.verdict


def test_a_layer_that_reads_padding_alone_tells_nothing():
    # One pixel, and the kernel looks at the corners of its padding only.
    analysis = rank_analysis(target(conv(1, 1, 1, stride=2, padding=1), leaky(), shape=(1, 1, 1)))
    assert [layer.free for layer in analysis.layers] == [1, 0]
    assert analysis.layers[0].unseen == analysis.joint_free == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_a_layer_that_reads_padding_alone_within_a_network(batch):
    net = target(conv(1, 2, 1), leaky(), conv(2, 2, 1, stride=2, padding=1), leaky(), shape=(1, 1, 1), batch_size=batch)
    analysis = rank_analysis(net)
    # The last layer: 8 unknowns a sample, 8 gradient rows for all, one weight row a sample, of which one overlaps.
    assert [layer.free for layer in analysis.layers] == [0, 2 * batch, 8 * batch - (8 + batch - 1)]
    assert analysis.joint_free == batch


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
    assert len(lines) == 1 + 2 + 3
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


@pytest.mark.parametrize(("code", "message"), [("branch", "cannot be traced"), ("none", "no Linear or convolutional")])
def test_without_layers_there_is_nothing_to_count(code, message):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.by * x if code == "branch" and x.sum() > 0 else x.flatten(1)

    with pytest.raises(NotAChain, match=message):
        rank_analysis(Target(Scale(), losses.Logistic(), (1,)))


def test_counting_a_deep_chain_at_full_resolution_takes_no_time():
    body: list[nn.Module] = [conv(3, 64, 7, stride=2, padding=3), leaky()]
    for width, blocks in ((64, 4), (128, 4), (256, 4), (512, 4)):
        for block in range(blocks):
            before = body[-2].out_channels
            body += [conv(before, width, 3, stride=2 if block == 0 else 1, padding=1), leaky()]
    aim = target(*body, shape=(3, 224, 224))
    start = time.process_time()
    analysis = rank_analysis(aim, measure=False)
    assert time.process_time() - start < 5
    assert analysis.layers[0].unknowns == 3 * 224 * 224
    assert analysis.layers[0].weight_rows == 64 * 112 * 112


# Models that are no chain: the counts of every layer all the same.


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride=stride, padding=1), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels != 4 * width:
            self.downsample = nn.Sequential(conv(channels, 4 * width, 1, stride=stride), nn.BatchNorm2d(4 * width))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet50(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 7, stride=2, padding=3), nn.BatchNorm2d(64)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        channels, blocks = 64, []
        for stage, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
            for at in range(count):
                blocks.append(Bottleneck(channels, width, 2 if stage and not at else 1))
                channels = 4 * width
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(channels, 1000)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(nn.functional.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))


def seen_by_hooks(model: nn.Module, shape: tuple[int, ...]) -> list[tuple[str, int, int, int]]:
    """Name, |x|, |W|, |z| of every layer in the order in which a run of the model meets it."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)):
            trained = module.weight.numel() if module.weight.requires_grad else 0
            module.register_forward_hook(
                lambda m, x, z, name=name, trained=trained: found.append((name, x[0].numel(), trained, z.numel()))
            )
    with torch.no_grad():
        model(torch.zeros(1, *shape))
    for module in model.modules():
        module._forward_hooks.clear()
    return found


def counted(analysis: RankAnalysis) -> list[tuple[str, int, int, int]]:
    return [(layer.name, layer.unknowns, layer.gradient_rows, layer.weight_rows) for layer in analysis.layers]


def refuse(*arguments: object, **named: object) -> None:
    raise AssertionError("counting needs no table of pixels and no copy of weights")


def test_resnet_50_is_counted_at_full_resolution_in_seconds(monkeypatch):
    model = ResNet50().eval()
    rank_analysis(target(shape=(1, 1, 1)), measure=False)  # what torch imports to trace is not counted
    monkeypatch.setattr(layers, "convolution", refuse)
    monkeypatch.setattr(layers, "linear", refuse)
    start = time.process_time()  # whatever runs beside it
    analysis = rank_analysis(Target(model, losses.Logistic(), (3, 224, 224)))
    assert time.process_time() - start < 5
    assert len(analysis.layers) == 54
    assert counted(analysis) == seen_by_hooks(model, (3, 224, 224))
    assert {layer.measured for layer in analysis.layers} == {Measured.NO}
    assert analysis.joint_free is None
    # Inside a block every layer reads the one before it; the first ones read a sum, or what is left by max pooling.
    reads = {layer.name: layer.reads for layer in analysis.layers}
    assert reads["conv1"] == "input"
    assert (reads["blocks.0.conv1"], reads["blocks.1.conv1"], reads["fc"]) == (None, None, None)
    assert (reads["blocks.1.conv2"], reads["blocks.1.conv3"]) == ("blocks.1.conv1", "blocks.1.conv2")


@cache
def of_a_deep_model() -> RankAnalysis:
    return rank_analysis(Target(ResNet50().eval(), losses.Logistic(), (3, 32, 32)))


def test_what_the_counts_of_a_model_leave_out_is_said_in_few_lines():
    analysis = of_a_deep_model()
    assert "the recursion cannot pass" in analysis.verdict
    assert "batch_norm" not in analysis.verdict
    assert "skip connections, normalisation and pooling" in analysis.verdict
    notes = "\n".join(analysis.notes)
    assert "max_pool2d" in notes
    assert "adaptive_avg_pool2d" in notes
    assert "1000 outputs a sample, the loss takes 1" in notes
    assert "1000 gradients of biases" in notes
    assert len(analysis.notes) < 10
    said = analysis.to_dict()
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    # Two pools, the outputs, and one addition for each of the 3 + 4 + 6 + 3 blocks; batch norm here is passed.
    assert sorted(group["count"] for group in said["obstacles"]) == [1, 1, 1, 16]
    assert len(str(analysis).splitlines()) == 1 + 54 + 1 + len(analysis.notes) + 1


class Forked(nn.Module):
    """Two layers read the first one's output; the last one reads both."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right, self.last = (
            nn.Linear(4, 10),
            nn.Linear(10, 12, False),
            nn.Linear(10, 3),
            nn.Linear(15, 1),
        )
        self.deep = nn.Linear(12, 12)

    def forward(self, x):
        x = torch.relu(self.first(x))
        left = self.deep(torch.tanh(self.left(x)))
        return self.last(torch.cat([left, self.right(x)], 1))


def test_virtual_constraints_come_down_the_one_way_back_only():
    analysis = rank_analysis(Target(Forked(), losses.Logistic(), (4,)), batch_size=2)
    found = {layer.name: layer for layer in analysis.layers}
    virtual = {name: layer.virtual_rows // 2 for name, layer in found.items()}
    # first: 10 outputs of 4 inputs; left: 12 of 10. The last layer reads two layers at once.
    assert virtual == {"first": 0, "left": 6, "right": 6, "deep": 6 + 2, "last": 0}
    assert found["last"].reads is None
    assert {name: layer.bias_rows for name, layer in found.items()} == {
        "first": 10, "left": 0, "right": 3, "deep": 12, "last": 1,
    }  # fmt: skip
    assert found["first"].expected_weight_rows == 10  # half of two samples' outputs
    assert found["left"].index == 2 * (10 - 12 - 6) - 120
    assert counted(rank_analysis(Target(Forked(), losses.Logistic(), (4,)))) == seen_by_hooks(Forked(), (4,))


class Apart(nn.Module):
    """Layers whose gradients never leave, each for another reason."""

    def __init__(self):
        super().__init__()
        self.no_grad, self.detached, self.frozen, self.sent = (nn.Linear(4, 4) for _ in range(4))
        self.frozen.weight.requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            x = torch.tanh(self.no_grad(x))
        x = torch.tanh(self.detached(x)).detach()
        return self.sent(torch.tanh(self.frozen(x))).sum(1, keepdim=True)


def test_gradients_that_are_not_sent_are_no_rows():
    model = Apart()
    analysis = rank_analysis(Target(model, losses.Logistic(), (4,)))
    model(torch.ones(1, 4)).sum().backward()
    expected = {
        name: (0 if layer.weight.grad is None else 16, 0 if layer.bias.grad is None else 4)
        for name, layer in model.named_children()
    }
    assert {layer.name: (layer.gradient_rows, layer.bias_rows) for layer in analysis.layers} == expected
    assert list(expected.values()) == [(0, 0), (0, 0), (0, 4), (16, 4)]
    assert [layer.weight_rows for layer in analysis.layers] == [4] * 4
    assert any("no gradient is sent for the weights of no_grad, detached, frozen" in note for note in analysis.notes)


def twice() -> nn.Module:
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(32, 1)

        def forward(self, x):
            return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))).flatten(1))

    return Twice()


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 2, 3, 1, 1), nn.Tanh(), nn.Conv2d(2, 2, 3, 1, 1), nn.Flatten(), nn.Linear(32, 1))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    return model


@pytest.mark.parametrize("model", [twice, tied])
def test_a_layer_that_is_used_twice_counts_as_a_batch_of_two(model):
    analysis = rank_analysis(Target(model(), losses.Logistic(), (2, 4, 4)))
    shared, last = analysis.layers
    once = rank_analysis(target(nn.Conv2d(2, 2, 3, padding=1), shape=(2, 4, 4)), measure=False, batch_size=2).layers[0]
    numbers = ("unknowns", "gradient_rows", "weight_rows", "virtual_rows", "bias_rows", "index")
    assert [getattr(shared, name) for name in numbers] == [getattr(once, name) for name in numbers]
    assert (shared.uses, last.uses) == (2, 1)
    assert any("(2 times)" in note for note in analysis.notes)


def test_a_computed_weight_tells_no_more_than_what_it_is_computed_from():
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.row, self.last = nn.Parameter(torch.ones(1, 6)), nn.Linear(5, 1)

        def forward(self, x):
            return self.last(nn.functional.linear(x, self.row.expand(5, 6) * 2))

    first = rank_analysis(Target(Repeated(), losses.Logistic(), (6,))).layers[0]
    assert (first.unknowns, first.gradient_rows, first.weight_rows) == (6, 6, 5)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 1))
    assert rank_analysis(Target(normed, losses.Logistic(), (6,))).layers[0].gradient_rows == 30


def test_transformer_layers_and_products_written_by_hand_are_counted():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.by_hand = nn.Parameter(torch.ones(8, 3))

        def forward(self, x):
            return (self.layer(x) @ self.by_hand).sum((1, 2))[:, None]

    analysis = rank_analysis(Target(Encoder().eval(), losses.Logistic(), (5, 8)))
    sizes = [(layer.unknowns, layer.gradient_rows, layer.weight_rows) for layer in analysis.layers]
    assert sizes == [(40, 192, 120), (40, 64, 40), (40, 128, 80), (80, 128, 40), (40, 24, 15)]


@settings(max_examples=20, deadline=None)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 4),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 3),
    transposed=st.booleans(),
)
def test_unread_values_are_those_that_no_gradient_reaches(size, kernel, stride, padding, dilation, transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(2, 3, kernel, stride, padding, dilation=dilation)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    x = torch.ones(1, 2, *size, requires_grad=True)
    try:
        z = layer(x)
    except RuntimeError:  # the kernel does not fit, or nothing is left
        assume(False)
    assume(z.numel() > 0)
    (reached,) = torch.autograd.grad(z.sum(), x)
    analysis = rank_analysis(Target(layer, losses.Logistic(), (2, *size)), measure=False)
    assert analysis.layers[0].unseen == int((reached == 0).sum())
    assert [numbers[1:] for numbers in counted(analysis)] == [(x.numel(), layer.weight.numel(), z.numel())]


def test_the_plot_of_a_deep_model_is_a_picture(tmp_path):
    plot(of_a_deep_model(), tmp_path / "rank.png")
    assert (tmp_path / "rank.png").read_bytes().startswith(b"\x89PNG")


def test_the_public_names_are_there():
    assert rgap.rank_analysis is rank_analysis
    assert rgap.RankAnalysis is RankAnalysis


@pytest.mark.parametrize("convolutions", [1, 2, 5])
def test_each_obstacle_is_counted_on_its_own(convolutions: int) -> None:
    body = [part for _ in range(convolutions) for part in (nn.Conv1d(2, 2, 3, padding=1), nn.Hardtanh())]
    target = Target(nn.Sequential(*body, nn.Flatten(1), nn.GELU(), nn.Linear(8, 3)).eval(), None, (2, 4))
    times = f"{convolutions} x " if convolutions > 1 else ""
    assert [str(group) for group in summarise(target.obstacles)] == [f"{times}hardtanh, gelu"]


@pytest.mark.parametrize(("blocks", "times"), [(1, ""), (2, "2 x "), (9, "9 x ")])
def test_the_same_obstacle_again_and_again_is_one_sentence(blocks: int, times: str) -> None:
    body = [part for _ in range(blocks) for part in (nn.Conv1d(2, 2, 3, padding=1), nn.MaxPool1d(1))]
    target = Target(nn.Sequential(*body, nn.Flatten(), nn.Linear(8, 3)).eval(), losses.CrossEntropy(3), (2, 4))
    [told] = [group.sentence for group in summarise(target.obstacles)]
    assert told.count("max_pool1d") == 1
    assert times in told
    assert told.count("Where its maxima come from") == 1
    assert len(told) < 150
