"""What the networks compute: their shapes inside, their graphs, and what their gradients determine."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgap import models
from rgap.models.chains import CHANNELS, six_convolutions
from rgap.nn.trace import follow

NETWORKS = {
    "cnn6": (lambda: models.cnn6(), (3, 32, 32), 7),
    "cnn6, narrow": (lambda: models.cnn6(width=24), (3, 32, 32), 7),
    "cnn6_d": (lambda: models.cnn6_d(), (3, 32, 32), 7),
    "fcn3": (lambda: models.fcn3(), (1, 28, 28), 3),
    "lenet": (lambda: models.lenet(), (3, 32, 32), 4),
    "convnet": (lambda: models.convnet(width=4), (3, 32, 32), 9),
    "vgg11": (lambda: models.vgg11(width=8), (3, 32, 32), 9),
    "strided": (lambda: models.strided(size=48), (3, 48, 48), 4),
    "resnet20": (lambda: models.resnet20(), (3, 32, 32), 20),
    "resnet20, convolutions as shortcuts": (lambda: models.resnet20(width=4, shortcut="conv"), (3, 32, 32), 22),
    "resnet20, neither norm nor pool": (lambda: models.resnet20(width=4, norm=False, pool=False), (3, 32, 32), 20),
    "resnet18": (lambda: models.resnet18(width=4), (3, 64, 64), 21),
    "residual": (lambda: models.residual(), (3, 32, 32), 9),
    "mlp": (lambda: models.mlp(30), (30,), 3),
    "vit_tiny": (lambda: models.vit_tiny(width=24, depth=2), (3, 32, 32), 10),
}
"""Name: how to build it, one input's shape, and how many layers have weights."""


def shapes(net: nn.Module, x: Tensor) -> dict[str, tuple[int, ...]]:
    """Of the output of every child, without the batch."""
    found = {}
    for name, child in net.named_children():
        x = child(x)
        found[name] = tuple(x.shape[1:])
    return found


def has_bias(net: nn.Module) -> list[bool]:
    return [m.bias is not None for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_followed_and_exported(name: str) -> None:
    build, shape, layers = NETWORKS[name]
    net = build().eval()
    assert len(follow(net, shape, None).uses) == layers
    x = torch.rand(1, *shape)
    exported = torch.export.export(net, (x,), strict=False).module()
    torch.testing.assert_close(exported(x), net(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient_and_the_input_stays_as_it_was(name: str) -> None:
    build, shape, _ = NETWORKS[name]
    net, x = build().eval(), torch.rand(2, *shape)
    kept = x.clone()
    net(x).sum().backward()
    assert torch.equal(x, kept)
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_what_is_known_only_in_training_is_off() -> None:
    for build in (models.resnet20, models.resnet18, models.residual, models.vit_tiny):
        assert not any(module.training for module in build().modules()), build


# CNN6.


def test_six_convolutions_of_other_widths() -> None:
    paper, ours = (
        models.cnn6(1, (17, 20), bias=True, seed=4),
        six_convolutions(CHANNELS, 1, (17, 20), bias=True, seed=4),
    )
    assert str(paper) == str(ours)
    assert all(torch.equal(a, b) for a, b in zip(paper.parameters(), ours.parameters(), strict=True))
    wide = six_convolutions([2 * c for c in CHANNELS])
    assert [m.out_channels for m in wide if isinstance(m, nn.Conv2d)] == [24, 72, 72, 72, 128, 256]
    with pytest.raises(ValueError, match=r"^got channels=\(1, 2\): expected 6 numbers of 1 or more$"):
        six_convolutions((1, 2))
    with pytest.raises(ValueError, match=r"^got width=0: expected 1 or more$"):
        models.cnn6(width=0)


# VGG-11.


@pytest.mark.parametrize("width", [8, 64])
def test_vgg11_has_the_channels_of_configuration_a(width: int) -> None:
    found = shapes(models.vgg11(width=width), torch.rand(1, 3, 32, 32))
    sizes = [(1, 16), (2, 8), (4, 8), (4, 4), (8, 4), (8, 2), (8, 2), (8, 1)]
    assert [found[f"conv{i}"] for i in range(1, 9)] == [(c * width, s, s) for c, s in sizes]
    assert found["fc"] == (10,)


def test_vgg11_has_as_many_weights_as_the_original_in_its_convolutions() -> None:
    net = models.vgg11()
    assert sum(p.numel() for name, p in net.named_parameters() if name.startswith("conv")) == 9_220_480
    assert has_bias(net) == [True] * 9
    assert has_bias(models.vgg11(width=4, bias=False)) == [False] * 9


# ResNets.


def test_resnet20_halves_the_map_and_doubles_the_channels_twice() -> None:
    found = shapes(models.resnet20(), torch.rand(1, 3, 32, 32))
    stages = {1: (16, 32, 32), 2: (32, 16, 16), 3: (64, 8, 8)}
    blocks = {f"block{stage}_{block}": shape for stage, shape in stages.items() for block in (1, 2, 3)}
    first = (16, 32, 32)
    assert found == {"conv": first, "norm": first, "act": first} | blocks | {"pool": (64,), "fc": (10,)}


@pytest.mark.parametrize("size", [1, 5, 32])
@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_resnet20_without_pool_reads_every_value(size: int, shortcut: str) -> None:
    net = models.resnet20(2, size, 3, 2, pool=False, shortcut=shortcut, blocks=1)
    left = (size + 3) // 4
    assert net.fc.in_features == 8 * left * left
    assert net(torch.rand(2, 2, size, size)).shape == (2, 3)


@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_norm_and_biases_of_resnet20(shortcut: str) -> None:
    def norms(net: nn.Module) -> int:
        return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())

    beside = 2 * (shortcut == "conv")
    assert norms(models.resnet20(shortcut=shortcut)) == 19 + beside
    plain = models.resnet20(norm=False, shortcut=shortcut)
    assert norms(plain) == 0
    assert has_bias(plain) == [False] * (19 + beside) + [True]
    assert all(has_bias(models.resnet20(norm=False, shortcut=shortcut, bias=True)))


def test_resnet18_has_the_maps_of_table_1() -> None:
    found = shapes(models.resnet18(), torch.rand(1, 3, 224, 224))
    sizes = {1: (64, 56, 56), 2: (128, 28, 28), 3: (256, 14, 14), 4: (512, 7, 7)}
    blocks = {f"block{stage}_{block}": shape for stage, shape in sizes.items() for block in (1, 2)}
    first = (64, 112, 112)
    stem = {"conv": first, "norm": first, "act": first, "maximum": (64, 56, 56)}
    assert found == stem | blocks | {"pool": (512,), "fc": (1000,)}


def test_no_size_is_too_small_for_resnet18_but_none() -> None:
    assert models.resnet18(size=1, classes=2, width=2)(torch.rand(1, 3, 1, 1)).shape == (1, 2)
    with pytest.raises(ValueError, match=r"^got in_channels=3, size=0, classes=1000, width=64: expected 1 or more$"):
        models.resnet18(size=0)


# The residual network that leaks.


def ranks(net: nn.Module, x: Tensor) -> dict[str, tuple[int, int, float]]:
    """For every convolution: values of one channel of its input, how many its gradient determines, and how well."""
    seen: dict[str, tuple[nn.Conv2d, Tensor, Tensor]] = {}

    def watch(name: str, layer: nn.Conv2d) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            seen[name] = (layer, inputs[0], output)

        layer.register_forward_hook(hook)

    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            watch(name, module)
    net(x).sum().backward()
    found = {}
    for name, (layer, inputs, output) in seen.items():
        values = inputs[0, 0].numel()
        units = torch.eye(values, dtype=x.dtype).reshape(values, 1, 1, *inputs.shape[2:])
        size, k = (layer.out_channels, 1, *layer.kernel_size), output.grad
        columns = [nn.grad.conv2d_weight(unit, size, k, layer.stride, layer.padding).flatten() for unit in units]
        singular = torch.linalg.svdvals(torch.stack(columns, 1))
        found[name] = values, int((singular > 1e-10 * singular[0]).sum()), float(singular[-1] / singular[0])
    return found


@pytest.mark.parametrize(("size", "width", "blocks"), [(32, 36, 2), (32, 36, 4), (16, 12, 2)])
def test_the_gradient_of_a_convolution_in_a_block_determines_its_input(size: int, width: int, blocks: int) -> None:
    x = torch.rand(1, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = ranks(models.residual(size=size, width=width, blocks=blocks).double(), x)
    inner = [f"block{n}.conv{m}" for n in range(1, blocks + 1) for m in (1, 2)]
    for name in (*inner, "conv3", "conv4"):
        values, rank, worst = found[name]
        assert rank == values, name
        assert worst > 0.01, name
    assert found["block1.conv1"][0] == ((size // 4) + 1) ** 2


def test_few_channels_leave_the_input_of_a_block_open() -> None:
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    values, rank, _ = ranks(models.residual(width=4).double(), x)["block1.conv1"]
    assert rank <= 9 * 4 < values


def test_many_blocks_leave_the_activations_at_their_size() -> None:
    x, sizes = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), {}
    with torch.no_grad():
        for name, child in models.residual(blocks=20).named_children():
            x = child(x)
            sizes[name] = float(x.square().mean().sqrt())
    before = sizes["act2"]
    assert all(before / 2 < sizes[f"block{n}"] < 2 * before for n in range(1, 21))


def test_biases_of_the_residual_network() -> None:
    assert has_bias(models.residual()) == [False] * 9
    assert has_bias(models.residual(bias=True)) == [True] * 9


# Perceptron.


def test_fcn3_is_a_perceptron() -> None:
    ours = models.mlp(5, (4, 3), 1, lambda: nn.LeakyReLU(0.2), bias=False, seed=2)
    paper = models.fcn3(5, (4, 3), seed=2)
    assert str(ours) == str(paper)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), paper.parameters(), strict=True))


# ViT.


def test_attention_is_softmax_of_scaled_products_of_every_head() -> None:
    attention, x = models.vit_tiny(width=12, depth=1, heads=3).double().encoders[0].attention, torch.rand(2, 5, 12)
    x = x.double()
    queries, keys, values = attention.qkv(x).split(12, 2)
    mixed = []
    for at in range(0, 12, 4):
        q, k, v = (part[..., at : at + 4] for part in (queries, keys, values))
        mixed.append(torch.softmax(q @ k.transpose(1, 2) / 2, 2) @ v)
    torch.testing.assert_close(attention(x), attention.out(torch.cat(mixed, 2)))


def test_without_positions_the_order_of_patches_is_nothing() -> None:
    net, x = models.vit_tiny(size=8, width=12, depth=2).double(), torch.rand(1, 3, 8, 8, dtype=torch.float64)
    moved = x.roll(4, 3)
    with torch.no_grad():
        assert not torch.allclose(net(x), net(moved))
        net.positions.zero_()
        torch.testing.assert_close(net(x), net(moved))


def test_sizes_of_deit_ti() -> None:
    net = models.vit_tiny(size=224, patch=16, classes=1000)
    assert sum(p.numel() for p in net.parameters()) == 5_717_416
    assert net.positions.shape == (1, 14 * 14 + 1, 192)
    assert len(net.encoders) == 12
    assert net.encoders[0].mlp[0].out_features == 768


@pytest.mark.parametrize("size", [8, 33, (20, 48)])
def test_strided_has_more_outputs_than_inputs_in_each_convolution(size: int | tuple[int, int]) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.rand(1, 3, height, width)
    found = [math.prod(shape) for name, shape in shapes(models.strided(3, size), x).items() if "conv" in name]
    assert all(before < after for before, after in pairwise([x.numel(), *found]))


@pytest.mark.parametrize("named", [{"in_channels": 0}, {"size": (8, 0)}, {"widths": (16, 0)}])
def test_strided_refuses_sizes_that_make_no_sense(named: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected 1 or more"):
        models.strided(**named)
