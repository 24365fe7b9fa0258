"""Random modules, one after another and around each other, as networks: against the module itself and autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from rgap import Target, losses
from rgap.nn.network import Network
from rgap.nn.ops import Affine, Gather, Linear, Sum
from tests.nn.modules import Call, Shifted, Skip, norm

MOST = 600
"""Values between two modules, that a test stays small."""
ANY: list[Callable[[Tensor], nn.Module]] = [
    lambda x: nn.Linear(x.shape[-1], 3),
    lambda x: nn.ReLU(inplace=True),
    lambda x: nn.LeakyReLU(0.2, inplace=True),
    lambda x: nn.GELU(),
    lambda x: nn.SiLU(),
    lambda x: nn.ELU(),
    lambda x: nn.Hardtanh(-0.5, 0.7),
    lambda x: nn.Softmax(1),
    lambda x: nn.LayerNorm(x.shape[-1]),
    lambda x: nn.GroupNorm(1, x.shape[1]),
    lambda x: Shifted(*x.shape[1:]),
    lambda x: Skip(nn.Tanh(), act=nn.ReLU(inplace=True)),
    lambda x: Skip(nn.Linear(x.shape[-1], x.shape[-1])),
    lambda x: Skip(Skip(nn.ELU()), nn.Sigmoid(), cat=True),
    lambda x: Call(lambda y: y.flatten(1)),
    lambda x: Call(lambda y: y.transpose(1, -1)),
    lambda x: Call(lambda y: y.flip(-1).roll(1, 1)),
    lambda x: Call(lambda y: functional.pad(y, (1, 2))),
    lambda x: Call(lambda y: functional.pad(y, (1, -1))),
    lambda x: Call(lambda y: functional.pad(y, (1, 0), value=0.7)),
    lambda x: Call(lambda y: torch.stack([y, 2 * y], 1)),
    lambda x: Call(lambda y: torch.cat([y, torch.ones_like(y)], 1)),
    lambda x: Call(lambda y: y[:, ::2]),
    lambda x: Call(lambda y: y.chunk(2, 1)[0]),
    lambda x: Call(lambda y: y.mean(-1, keepdim=True)),
    lambda x: Call(lambda y: y + y.mean(1, keepdim=True)),
    lambda x: Call(lambda y: (1 - y) * 0.5 - y / 4),
    lambda x: Call(lambda y: y * (y > 0)),
    lambda x: Call(lambda y: torch.add(y, y, alpha=2)),
]
PICTURES: list[Callable[[Tensor], nn.Module]] = [
    lambda x: nn.Conv2d(x.shape[1], 3, 3, 2, 2, 1, 1, False),
    lambda x: nn.Conv2d(x.shape[1], 2 * x.shape[1], 2, 1, 1, 2, x.shape[1]),
    lambda x: nn.Conv2d(x.shape[1], 2, 3, padding=1, padding_mode="circular"),
    lambda x: nn.Conv2d(x.shape[1], 2, 3, padding=1, padding_mode="reflect"),
    lambda x: nn.ConvTranspose2d(x.shape[1], 2, 3, 2, 1, 1),
    lambda x: norm(x.shape[1]),
    lambda x: nn.AvgPool2d(2),
    lambda x: nn.MaxPool2d(2, ceil_mode=True),
    lambda x: nn.AdaptiveAvgPool2d(2),
    lambda x: nn.InstanceNorm2d(x.shape[1], affine=True),
    lambda x: nn.Upsample(scale_factor=2),
    lambda x: nn.PixelUnshuffle(2),
    lambda x: nn.Sequential(
        nn.Upsample(scale_factor=2), Skip(nn.Conv2d(x.shape[1], x.shape[1], 3, padding=1), act=nn.ELU())
    ),
    lambda x: Skip(nn.Conv2d(x.shape[1], 4, 3, 2, 1), nn.Conv2d(x.shape[1], 4, 1, 2), nn.Softplus()),
    lambda x: Skip(nn.Conv2d(x.shape[1], 2, 3, padding=1), cat=True),
]
SHAPES = [(4, 6, 6), (3, 4, 5), (2, 7), (8,)]


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...], int]:
    """Up to five modules of those that take what comes, and a Linear layer behind them; in float64, with its seed."""
    shape, seed = draw(st.sampled_from(SHAPES)), draw(st.integers(0, 2**31))
    kinds = draw(st.lists(st.integers(0, len(ANY) + 2 * len(PICTURES) - 1), min_size=1, max_size=5))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x, chosen = torch.randn(2, *shape, dtype=torch.float64), []
        first = x.clone().requires_grad_()
        for kind in kinds:
            make = ANY[kind] if kind < len(ANY) else PICTURES[(kind - len(ANY)) % len(PICTURES)]
            try:
                module = make(x).double().eval()
                with torch.no_grad():
                    after, alone = module(x.clone()), module(x[:1].clone())
                torch.autograd.grad(nn.Sequential(*chosen, module)(first.clone()).sum(), first, allow_unused=True)
            except (RuntimeError, ValueError, IndexError):
                continue  # it does not take this shape, or torch has no gradient of two that write in place
            # Samples must not see each other: some modules take a picture without a batch for one with it.
            apart = alone.shape == (1, *after.shape[1:]) and torch.allclose(after[:1], alone)
            if after.dim() > 1 and 0 < alone.numel() <= MOST and apart:
                chosen.append(module)
                x = after
        head = nn.Linear(x[0].numel(), 3)
    return nn.Sequential(*chosen, nn.Flatten(), head).double().eval(), shape, seed


@settings(max_examples=10, deadline=None)
@given(models())
def test_a_random_network_is_its_module(drawn: tuple[nn.Module, tuple[int, ...], int]) -> None:
    model, shape, seed = drawn
    network = Target(model, losses.CrossEntropy(3), shape).network
    generator = torch.Generator().manual_seed(seed)
    several = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    values = network.forward(several)
    torch.testing.assert_close(values[-1], model(several.clone()), rtol=1e-9, atol=1e-10)
    assert [tuple(value.shape[1:]) for value in values] == list(network.shapes)
    segments_partition(network, values)

    x = several[:1].clone().requires_grad_()
    k = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    outputs = model(x.clone())
    wanted, *of_weights = torch.autograd.grad((outputs * k).sum(), [x, *parameters.values()], allow_unused=True)
    values = network.forward(x.detach())
    slopes = network.slopes(values)
    ks = network.vjp(values, slopes, {len(values) - 1: k})
    torch.testing.assert_close(torch.zeros_like(x) if ks[0] is None else ks[0], wanted, rtol=1e-8, atol=1e-10)
    by_name = dict(zip(parameters, of_weights, strict=True))
    for layer, found in network.gradients(values, ks):
        packed = layer.pack_weight(by_name[layer.weight_name][None])
        torch.testing.assert_close(found, packed, rtol=1e-8, atol=1e-10)
    move = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    tangent = network.jvp(values, slopes, move)[-1]
    torch.testing.assert_close((tangent * k).sum(1), (move * wanted).flatten(1).sum(1), rtol=1e-8, atol=1e-9)


def segments_partition(network: Network, values: list[Tensor]) -> None:
    places = [place for segment in network.segments for place in segment.nodes]
    assert places == list(range(len(network.nodes)))
    for segment in network.segments:
        for place in segment.nodes:
            assert min(network.nodes[place].reads) >= segment.entry
        part = network.part([segment]).forward(values[segment.entry])
        torch.testing.assert_close(part[-1], values[segment.exit], rtol=1e-9, atol=1e-10)


def built(*layers: nn.Module, shape: tuple[int, ...] = (4, 6, 6)) -> tuple[nn.Module, Network]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        count = nn.Sequential(*layers).double()(torch.zeros(1, *shape, dtype=torch.float64)).numel()
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(count, 3)).double().eval()
    return model, Target(model, losses.CrossEntropy(3), shape).network


@pytest.mark.parametrize(
    "move",
    [
        nn.Upsample(scale_factor=2),
        Call(lambda x: functional.pad(x, (1, -1))),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Dropout()),
    ],
)
def test_a_move_that_a_layer_and_something_after_it_read_stays_apart(move: nn.Module) -> None:
    """A layer alone takes the move into its own geometry; here the shortcut reads what was moved as well."""
    model, network = built(move.eval(), Skip(nn.Conv2d(4, 4, 3, padding=1)))
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(network.forward(x)[-1], model(x), rtol=1e-12, atol=1e-12)
    kinds = [type(node.op) for node in network.nodes]
    assert kinds[:3] == [Gather, Linear, Sum]


@pytest.mark.parametrize(
    "function",
    [lambda x: x / x.abs().max(), lambda x: x * x.norm(), lambda x: x * (x > 0)],
)
def test_numbers_and_masks_that_the_input_gives_are_followed(function: Callable[[Tensor], Tensor]) -> None:
    model, network = built(Call(function))
    x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(network.forward(x)[-1], model(x), rtol=1e-12, atol=1e-12)
    assert not any(isinstance(node.op, Affine) for node in network.nodes)


def test_a_constant_that_is_made_beside_the_input_is_one() -> None:
    model, network = built(Call(lambda x: x - x.new_ones(()) * 0.3))
    x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(network.forward(x)[-1], model(x), rtol=1e-12, atol=1e-12)
    assert isinstance(network.nodes[0].op, Affine)


def test_what_nobody_reads_is_left_out() -> None:
    def unread(x: Tensor) -> Tensor:
        x.relu().mean()
        return 2 * x

    _, network = built(Call(unread))
    assert [type(node.op) for node in network.nodes] == [Affine, Gather, Linear]


@pytest.mark.parametrize(
    ("function", "said"),
    [(lambda x: x, "returns its input"), (lambda x: x.shape[0], "something else than one tensor")],
)
def test_a_model_that_is_no_network_says_so(function: Callable[[Tensor], Tensor], said: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    with pytest.raises(NotImplementedError, match=said):
        Target(Model(), losses.CrossEntropy(3), (3,)).network  # noqa: B018
