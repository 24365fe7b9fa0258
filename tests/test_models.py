from __future__ import annotations

import pytest
import torch
from torch import nn

from rgap import models

# (in, out, kernel, stride, padding) of each convolution, as the paper's figures draw them.
CNN6 = [
    (3, 12, 4, 2, 2),
    (12, 36, 3, 2, 1),
    (36, 36, 3, 1, 1),
    (36, 36, 3, 1, 1),
    (36, 64, 3, 2, 1),
    (64, 128, 3, 1, 1),
]
CNN6_D = [
    (3, 12, 4, 2, 2),
    (12, 20, 3, 2, 1),
    (20, 36, 3, 1, 1),
    (36, 36, 3, 1, 1),
    (36, 64, 3, 2, 1),
    (64, 128, 3, 1, 1),
]
BUILDERS = [models.cnn6, models.cnn6_d, models.fcn3]


@pytest.mark.parametrize(("build", "rows"), [(models.cnn6, CNN6), (models.cnn6_d, CNN6_D)])
def test_convolutional_nets_are_those_of_the_paper(build, rows):
    net = build()
    convolutions = [module for module in net if isinstance(module, nn.Conv2d)]
    got = [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.padding[0]) for c in convolutions]
    assert got == rows
    assert all(c.kernel_size[0] == c.kernel_size[1] and c.groups == 1 for c in convolutions)
    names = [name for i in range(1, 7) for name in (f"conv{i}", f"act{i}")]
    assert [name for name, _ in net.named_children()] == [*names, "flatten", "fc"]
    assert net.fc.out_features == 1
    assert all(net.get_submodule(f"act{i}").negative_slope == 0.2 for i in range(1, 7))
    assert not [name for name, _ in net.named_parameters() if name.endswith("bias")]


def test_fcn3_is_that_of_the_paper():
    net = models.fcn3()
    assert [name for name, _ in net.named_children()] == ["flatten", "fc1", "act1", "fc2", "act2", "fc3"]
    assert {name: tuple(p.shape) for name, p in net.named_parameters()} == {
        "fc1.weight": (1000, 784),
        "fc2.weight": (100, 1000),
        "fc3.weight": (1, 100),
    }
    assert net.act1.negative_slope == net.act2.negative_slope == 0.2
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, 1)


@pytest.mark.parametrize("size", [32, 28, (17, 40), 1])
@pytest.mark.parametrize("build", [models.cnn6, models.cnn6_d])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_last_layer_fits_any_size(build, channels, size):
    net = build(channels, size)
    height, width = (size, size) if isinstance(size, int) else size
    assert net(torch.rand(2, channels, height, width)).shape == (2, 1)


def test_fcn3_takes_other_widths():
    net = models.fcn3(12, (7,))
    assert {name: tuple(p.shape) for name, p in net.named_parameters()} == {"fc1.weight": (7, 12), "fc2.weight": (1, 7)}
    assert [name for name, _ in net.named_children()] == ["flatten", "fc1", "act1", "fc2"]


@pytest.mark.parametrize("build", BUILDERS)
def test_weights_depend_on_the_seed_alone(build):
    torch.manual_seed(1)
    first = build(seed=5).state_dict()
    torch.manual_seed(2)
    again, other = build(seed=5).state_dict(), build(seed=6).state_dict()
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert not torch.equal(weight, other[name])


def test_weights_are_torchs_default_draw():
    net = models.fcn3(6, (5,), seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = [nn.Linear(6, 5, bias=False).weight, nn.Linear(5, 1, bias=False).weight]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), expected, strict=True))


@pytest.mark.parametrize("build", BUILDERS)
def test_the_global_random_state_is_left_alone(build):
    before = torch.get_rng_state()
    build(seed=9)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_random_state_is_left_alone_when_building_fails():
    def broken() -> nn.Module:
        raise RuntimeError("no such activation")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no such activation"):
        models.cnn6(activation=broken)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("build", BUILDERS)
def test_activation_and_bias_can_be_chosen(build):
    net = build(activation=nn.Tanh, bias=True)
    activations = [module for name, module in net.named_children() if name.startswith("act")]
    assert activations
    assert all(isinstance(module, nn.Tanh) for module in activations)
    assert len(set(map(id, activations))) == len(activations)
    layers = [module for module in net if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert all(layer.bias is not None for layer in layers)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match=r"in_channels=0, size=32: expected 1 or more"):
        models.cnn6(0)
    with pytest.raises(ValueError, match=r"size=\(4, 0\)"):
        models.cnn6_d(size=(4, 0))
    with pytest.raises(ValueError, match=r"hidden=\(0,\): expected widths"):
        models.fcn3(4, (0,))
