from __future__ import annotations

import pytest
import torch
from torch import nn

from rgap import Target, losses, models

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


# Networks that people train.


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def widths(*sizes: tuple[int, int, int]) -> int:
    """Weights of convolutions (in, out, kernel)."""
    return sum(i * o * k * k for i, o, k in sizes)


TRAINED = [
    ("vgg11", lambda seed: models.vgg11(width=4, seed=seed), (3, 32, 32), 10),
    ("resnet20", lambda seed: models.resnet20(width=4, blocks=1, seed=seed), (3, 32, 32), 10),
    ("without norm", lambda s: models.resnet20(1, 17, 10, 4, False, False, shortcut="conv", seed=s), (1, 17, 17), 10),
    ("resnet18", lambda seed: models.resnet18(width=4, classes=7, seed=seed), (3, 40, 48), 7),
    ("residual", lambda seed: models.residual(size=16, classes=3, norm=True, seed=seed), (3, 16, 16), 3),
    ("mlp", lambda seed: models.mlp(12, (5, 4), 3, seed=seed), (12,), 3),
    ("vit_tiny", lambda seed: models.vit_tiny(size=8, width=12, depth=2, heads=3, seed=seed), (3, 8, 8), 10),
]  # fmt: skip


@pytest.mark.parametrize(("make", "shape", "classes"), [row[1:] for row in TRAINED], ids=[row[0] for row in TRAINED])
def test_a_network_that_people_train(make, shape, classes):
    before = torch.get_rng_state()
    net, again, other = make(5), make(5), make(6)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert net(torch.rand(2, *shape)).shape == (2, classes)
    assert Target(net.eval(), losses.CrossEntropy(classes), shape).network.shapes[-1] == (classes,)


def test_published_parameter_counts():
    """ResNet-18 has 11,689,512 (He et al. 2016, as torch counts them), DeiT-Ti 5.7 million, ResNet-20 0.27 million."""
    assert parameters(models.resnet18()) == 11_689_512
    assert round(parameters(models.vit_tiny(size=224, patch=16, classes=1000)) / 1e6, 1) == 5.7
    assert round(parameters(models.resnet20()) / 1e6, 2) == 0.27
    plain = widths((3, 16, 3), (16, 16, 3)) + 5 * widths((16, 16, 3)) + widths((16, 32, 3)) + 5 * widths((32, 32, 3))
    plain += widths((32, 64, 3)) + 5 * widths((64, 64, 3)) + 64 * 10 + 10
    assert parameters(models.resnet20(norm=False)) == plain
    vgg = zip((3, 64, 128, 256, 256, 512, 512, 512), (64, 128, 256, 256, 512, 512, 512, 512), strict=True)
    assert parameters(models.vgg11(bias=False)) == sum(9 * i * o for i, o in vgg) + 512 * 10


def test_the_shortcut_without_parameters_takes_every_second_pixel():
    block = models.resnet20(width=2, blocks=1, norm=False).block2_1
    x = torch.rand(1, 2, 6, 6)
    out = block.shortcut(x)
    assert torch.equal(out[:, :2], x[:, :, ::2, ::2])
    assert not out[:, 2:].any()
    with torch.no_grad():
        inner = block.conv2(torch.relu(block.conv1(x)))
        assert torch.equal(block(x), torch.relu(out + inner))


def test_cnn6_of_another_width_is_cnn6_d():
    assert all(
        torch.equal(a, b)
        for a, b in zip(models.cnn6(width=20, seed=3).parameters(), models.cnn6_d(seed=3).parameters(), strict=True)
    )


def test_settled_batch_norm_has_the_inputs_statistics():
    net = nn.Sequential(nn.BatchNorm1d(3))
    x = torch.randn(50, 3) * 4 + 2
    models.settled(net, x, 200)
    assert not net.training
    torch.testing.assert_close(net[0].running_mean, x.mean(0))
    torch.testing.assert_close(net(x).std(0), torch.ones(3), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.vgg11(width=0), "width=0"),
        (lambda: models.resnet20(blocks=0), "blocks=0"),
        (lambda: models.resnet20(shortcut="B"), "shortcut='B': expected 'pad' or 'conv'"),
        (lambda: models.resnet18(classes=0), "classes=0"),
        (lambda: models.residual(size=0), "size=0"),
        (lambda: models.mlp(3, (0,)), r"hidden=\(0,\): expected widths of 1 or more"),
        (lambda: models.vit_tiny(size=30), "a size that is a multiple of the patch"),
        (lambda: models.vit_tiny(width=10), "a width that is one of the heads"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
