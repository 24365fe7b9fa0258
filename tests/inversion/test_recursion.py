"""Every kind of operation on the way back, in a small network around it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, capture, losses
from rgap.attacks import Closed, Reconstruction, Recursive, Status
from rgap.inversion.recursion import solve_sides
from rgap.inversion.state import Observation, State
from rgap.nn import layers as made
from rgap.nn.ops import Linear
from tests.nn.modules import ByHand, Call, Shifted, Skip, norm

SHAPE = (2, 6, 6)


def attacked(
    *layers: nn.Module,
    attack: Recursive | None = None,
    shape: tuple[int, ...] = SHAPE,
    dtype: torch.dtype = torch.float64,
) -> tuple[Reconstruction, Tensor]:
    """A convolution, the layers, and a Linear layer, attacked with a random sample."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in layers:
            for parameter in layer.parameters():
                if parameter.dim() > 1:
                    nn.init.kaiming_uniform_(parameter, a=5**0.5)
        stem: list[nn.Module] = [nn.Conv2d(shape[0], 8, 3, 1, 1), nn.LeakyReLU(0.2)] if len(shape) == 3 else []
        count = nn.Sequential(*stem, *layers).eval()(torch.rand(1, *shape)).numel()
        model = nn.Sequential(*stem, *layers, nn.Flatten(), nn.Linear(count, 3)).to(dtype).eval()
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    target = Target(model, losses.CrossEntropy(3), shape, (0.0, 1.0))
    return Recursive()(target, capture(target, x, torch.tensor([2.0]))), x


def conv(before: int, after: int, **named: object) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, **named)  # type: ignore[arg-type]


def silenced(layer: nn.Conv2d, count: int) -> nn.Conv2d:
    """With outputs far below zero."""
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias[:count] -= 5
    return layer


PASSED = {
    "gelu": lambda: (conv(8, 10), nn.GELU()),
    "gelu by tanh": lambda: (conv(8, 10), nn.GELU("tanh")),
    "silu": lambda: (conv(8, 10), nn.SiLU()),
    "mish": lambda: (conv(8, 10), nn.Mish()),
    "hardswish": lambda: (conv(8, 10), nn.Hardswish()),
    "hardswish with silent units": lambda: (silenced(conv(8, 20), 4), nn.Hardswish()),
    "celu": lambda: (conv(8, 10), nn.CELU(0.5)),
    "log sigmoid": lambda: (conv(8, 10), nn.LogSigmoid()),
    "hardsigmoid": lambda: (conv(8, 10), nn.Hardsigmoid()),
    "gelu behind batch norm": lambda: (conv(8, 24), norm(24), nn.GELU()),
    "relu6": lambda: (conv(8, 16), nn.ReLU6()),
    "two activations": lambda: (conv(8, 10), nn.Tanh(), nn.LeakyReLU(0.3)),
    "batch norm": lambda: (conv(8, 10, bias=False), norm(10), nn.LeakyReLU(0.2)),
    "reflected": lambda: (conv(8, 10, padding_mode="reflect"), nn.ELU()),
    "replicated": lambda: (conv(8, 10, padding_mode="replicate"), nn.ELU()),
    "circular": lambda: (conv(8, 10, padding_mode="circular"), nn.ELU()),
    "padded with ones": lambda: (nn.ConstantPad2d(1, 1.0), nn.Conv2d(8, 10, 3), nn.ELU()),
    "upsampled": lambda: (nn.Upsample(scale_factor=2), nn.Conv2d(8, 10, 3, 2, 1), nn.ELU()),
    "shuffled": lambda: (nn.PixelUnshuffle(2), conv(32, 33), nn.ELU(), nn.PixelShuffle(1)),
    "permuted": lambda: (Call(lambda x: x.permute(0, 1, 3, 2).flip(2)), conv(8, 9), nn.Softplus()),
    "transposed": lambda: (nn.ConvTranspose2d(8, 8, 3, 2, 1, output_padding=1), nn.ELU()),
    "grouped": lambda: (conv(8, 16, groups=2), nn.ELU()),
    "depthwise": lambda: (conv(8, 16, groups=8), nn.ELU(), nn.Conv2d(16, 16, 1), nn.ELU()),
    "by hand": lambda: (nn.Flatten(), ByHand(288, 20), nn.Tanh()),
    "constants": lambda: (Call(lambda x: (x - 0.3) / 0.5), conv(8, 9), nn.ELU()),
    "learned constants": lambda: (Shifted(8, 6, 6), conv(8, 9), nn.ELU()),
    "dropout that is off": lambda: (conv(8, 9), nn.Dropout(), nn.ELU()),
    "layer norm": lambda: (nn.Flatten(), nn.Linear(288, 20), nn.LayerNorm(20), nn.ELU()),
    "group norm": lambda: (conv(8, 9), nn.GroupNorm(3, 9), nn.ELU()),
    "mean of leaky": lambda: (nn.AvgPool2d(2),),
    "mean of a layer": lambda: (conv(8, 24), nn.AvgPool2d(2)),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSED)
def test_it_is_passed(name: str) -> None:
    found, x = attacked(*PASSED[name]())
    assert found.status is Status.EXACT, found
    assert float((found.inputs - x).abs().max()) <= 1e-9
    assert found.labels.tolist() == [2.0]


@pytest.mark.parametrize("name", ["gelu", "batch norm", "transposed", "group norm", "layer norm"])
def test_it_is_passed_in_float32(name: str) -> None:
    found, x = attacked(*PASSED[name](), dtype=torch.float32)
    assert found.status is Status.EXACT, found
    assert float((found.inputs - x).abs().max()) <= 1e-4


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.Conv1d(2, 8, 3, padding=1), nn.ELU(), nn.Conv1d(8, 8, 3, padding=1), nn.ELU()), (2, 12)),
        ((nn.Conv3d(2, 5, 3, padding=1), nn.ELU(), nn.Conv3d(5, 8, 3, padding=1), nn.ELU()), (2, 4, 3, 4)),
        ((nn.Linear(6, 9), nn.LayerNorm(9), nn.ELU()), (4, 6)),
    ],
)
def test_other_numbers_of_dimensions(layers: tuple[nn.Module, ...], shape: tuple[int, ...]) -> None:
    found, x = attacked(*layers, shape=shape)
    assert found.status is Status.EXACT, found
    assert float((found.inputs - x).abs().max()) <= 1e-9


STOPS = {
    "avg_pool2d makes 72 values of 288": lambda: (nn.Tanh(), nn.AvgPool2d(2)),
    "mean makes 8 values of 288": lambda: (nn.Tanh(), Call(lambda x: x.mean((2, 3)))),
    "mean makes 48 values of 288": lambda: (Call(lambda x: x.mean(2)),),
    "keeps 144 of 288 values": lambda: (Call(lambda x: x[:, 4:]),),
    "layer_norm loses mean and size of 48 groups of values": lambda: (nn.LayerNorm(6),),
    "instance_norm loses mean and size of 8 groups of values": lambda: (nn.InstanceNorm2d(8),),
    "softmax is not inverted": lambda: (nn.Softmax(1),),
    "multiplies 1 values by zero": lambda: (Call(lambda x: x * torch.tensor([0.0, *[1.0] * 5])),),
}  # fmt: skip


@pytest.mark.parametrize("reason", STOPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_stops_and_says_why(reason: str, dtype: torch.dtype) -> None:
    found, _ = attacked(*STOPS[reason](), dtype=dtype)
    assert (found.status, found.answers) == (Status.NOT_CONVERGED, ())
    assert found.reason.startswith("stops at ")
    assert reason in found.reason


def test_closed_goes_on_from_where_the_recursion_stops() -> None:
    """The picture is smooth, as the prior has it; what is known behind the pool determines it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, 1, 1), nn.ELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 4)
        ).double()  # fmt: skip
    across = torch.linspace(0, 3, 8, dtype=torch.float64)
    x = (0.5 + 0.4 * torch.sin(across)[:, None] * torch.cos(across))[None, None]
    target = Target(model, losses.CrossEntropy(4), (1, 8, 8), (0.0, 1.0))
    update = capture(target, x, torch.tensor([1.0]))
    assert Recursive()(target, update).answers == ()
    found = Closed()(target, update)
    assert found.status is Status.EXACT, found
    assert float((found.inputs - x).abs().max()) <= 1e-6
    joint = found.answers[0].joint
    assert joint is not None
    assert joint.free == 0


def test_what_is_open_behind_a_block_is_not_followed_through_it() -> None:
    block = Skip(nn.Conv2d(8, 8, 3, 1, 1), act=nn.ELU())
    found, _ = attacked(block, nn.Conv2d(8, 1, 3, 2, 1), nn.ELU())
    assert found.status is Status.NOT_CONVERGED
    assert "leaves its input open" in found.reason


@pytest.mark.parametrize("seed", range(3))
def test_beside_an_empty_background_a_value_on_its_wrong_side_is_found(seed: int) -> None:
    """Half of the input is empty, so that hundreds of values are at their kinks; one that reads something is on its
    wrong side."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    layer = made.convolution(
        "conv", normal(16, 3, 4, 4) / 7, None, (3, 24, 24), (2, 2), ((1, 1),) * 2, (1, 1), 1, "w", None
    )
    x = normal(1, 3, 24, 24)
    x[..., :12, :] = 0
    x = x.reshape(1, 3, -1)
    z, k, std = layer.output(x), normal(1, 16, layer.positions), 1e-6
    empty = layer.read(x) == 0
    near = int(z.abs().where(~empty, torch.inf).argmin())
    here, there = k.clone(), torch.where(empty, 0.2 * k, k)
    here.view(-1)[near] *= 0.2
    grad = layer.grad_weight(x, k)
    grad = grad + 2e-8 * grad.abs().max() * normal(*grad.shape)
    value, error = layer.unpack_output(z + std * normal(*z.shape)), torch.full_like(layer.unpack_output(z), std)
    state, other = (State(value, layer.unpack_output(of), None, error) for of in (here, there))
    given = Observation({"w": grad}, 1.2e-7, 2.4e-5)
    found, _, solution = solve_sides(Linear(layer), replace(state, alternative=other), grad, None, True, given)
    assert torch.equal(layer.pack_output(found.cotangent)[~empty], k[~empty])
    assert float((solution.x - x).abs().max()) < 1e-3
