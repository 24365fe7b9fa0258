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
OF_CLASSES = [models.lenet, models.convnet]


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


@pytest.mark.parametrize("build", [*BUILDERS, *OF_CLASSES])
def test_weights_depend_on_the_seed_alone(build):
    torch.manual_seed(1)
    first = build(seed=5).state_dict()
    torch.manual_seed(2)
    again, other = build(seed=5).state_dict(), build(seed=6).state_dict()
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        # Batch norm begins at the same values, always.
        assert not torch.equal(weight, other[name]) or "norm" in name


def test_weights_are_torchs_default_draw():
    net = models.fcn3(6, (5,), seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = [nn.Linear(6, 5, bias=False).weight, nn.Linear(5, 1, bias=False).weight]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), expected, strict=True))


@pytest.mark.parametrize("build", [*BUILDERS, *OF_CLASSES])
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


# Networks of several classes.


def test_lenet_is_that_of_deep_leakage_from_gradients():
    net = models.lenet()
    convolutions = [module for module in net if isinstance(module, nn.Conv2d)]
    got = [(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding) for c in convolutions]
    assert got == [(i, 12, (5, 5), (s, s), (2, 2)) for i, s in ((3, 2), (12, 2), (12, 1))]
    names = [name for i in range(1, 4) for name in (f"conv{i}", f"act{i}")]
    assert [name for name, _ in net.named_children()] == [*names, "flatten", "fc"]
    assert all(isinstance(net.get_submodule(f"act{i}"), nn.Sigmoid) for i in range(1, 4))
    # 32 becomes 16, then 8, and stays 8.
    weights = 12 * 3 * 25 + 2 * 12 * 12 * 25 + 10 * 12 * 8 * 8
    assert sum(p.numel() for p in net.parameters()) == weights + 3 * 12 + 10


def test_lenets_weights_are_uniform_around_zero():
    values = torch.cat([p.detach().flatten() for p in models.lenet().parameters()])
    assert -0.5 <= float(values.min()) < -0.499
    assert 0.499 < float(values.max()) <= 0.5
    assert float(values.mean().abs()) < 0.01
    assert abs(float(values.std()) - 1 / 12**0.5) < 0.005
    assert all(float(p.detach().abs().max()) > 0.3 for p in models.lenet().parameters())


@pytest.mark.parametrize("width", [1, 3, 64])
def test_convnet_is_that_of_inverting_gradients(width):
    net = models.convnet(width=width)
    channels = [width * times for times in (1, 2, 2, 4, 4, 4, 4, 4)]
    convolutions = [module for module in net if isinstance(module, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == channels
    assert {(c.kernel_size, c.stride, c.padding) for c in convolutions} == {((3, 3), (1, 1), (1, 1))}
    names = []
    for i in range(1, 9):
        names += [f"conv{i}", f"norm{i}", f"act{i}"] + [f"pool{i}"] * (i in (6, 8))
    assert [name for name, _ in net.named_children()] == [*names, "flatten", "fc"]
    assert net.pool6.kernel_size == net.pool8.kernel_size == 3
    # Weight and bias of each convolution and each norm; 32 becomes 10, then 3.
    expected, before = 0, 3
    for c in channels:
        expected += 9 * before * c + c + 2 * c
        before = c
    expected += 10 * before * 3 * 3 + 10
    assert sum(p.numel() for p in net.parameters()) == expected
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("build", "size"),
    [*((models.lenet, size) for size in (32, 28, 7, 1)), *((models.convnet, size) for size in (32, 28, 9, 11))],
)
def test_any_size_and_number_of_classes_fit(build, size, channels):
    small = {} if build is models.lenet else {"width": 2}
    for classes in (1, 10, 100):
        net = build(channels, size, classes, **small)
        assert net(torch.rand(2, channels, size, size)).shape == (2, classes)


def test_impossible_sizes_of_networks_of_several_classes_are_refused():
    with pytest.raises(ValueError, match=r"^got in_channels=0, size=32, classes=10: expected 1 or more$"):
        models.lenet(0)
    with pytest.raises(ValueError, match=r"^got in_channels=3, size=32, classes=0: expected 1 or more$"):
        models.lenet(classes=0)
    with pytest.raises(ValueError, match=r"^got in_channels=3, classes=10, width=-1: expected 1 or more$"):
        models.convnet(width=-1)
    for size in (8, 0):
        with pytest.raises(ValueError, match=f"^got size={size}: expected 9 or more"):
            models.convnet(size=size)
