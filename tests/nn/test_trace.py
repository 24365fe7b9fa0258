"""From modules to layers: one row for each way to write a plain chain, and one for each obstacle."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from rgap import Target, losses
from rgap.nn.activation import Activation
from rgap.nn.activations import ACTIVATIONS as KNOWN_ACTIVATIONS
from rgap.nn.activations import ELU, SELU, Identity, LeakyReLU, LogSigmoid, ReLU, Sigmoid, Softplus, Tanh
from rgap.nn.graph import Graph, Use
from rgap.nn.network import Network
from rgap.nn.obstacles import FOLLOWED, KNOWN, Kind, NotAChain, Obstacle, known
from rgap.nn.ops import Linear
from rgap.nn.outputs import outputs_of
from rgap.nn.trace import follow


class Model(nn.Module):
    """Ordinary forward code: a function of the module and the input."""

    def __init__(self, code: Callable[[Any, Tensor], Any], **parts: nn.Module | nn.Parameter):
        super().__init__()
        self.code = code
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


def inner(code: Callable[[Tensor], Any], shape: tuple[int, ...] = (2, 4, 4)) -> Model:
    """A convolution, then some code, then a Linear layer that takes whatever comes."""
    first = nn.Conv2d(shape[0], 2, 1)
    with torch.no_grad():
        width = code(first(torch.ones(1, *shape))).float().flatten(1).shape[1]
    model = Model(lambda m, x: m.last(code(m.first(x)).flatten(1)), first=first, last=nn.Linear(width, 1))
    return model


def obstacles(model: nn.Module, shape: tuple[int, ...], outputs: int | None = 1) -> tuple[Obstacle, ...]:
    found = follow(model, shape, outputs).obstacles
    assert found
    return found


def plain(model: nn.Module, shape: tuple[int, ...], outputs: int | None = 1) -> Graph:
    """What a model without obstacles is made of."""
    graph = follow(model, shape, outputs)
    if graph.obstacles:
        raise NotAChain(graph.obstacles)
    return graph


def network_of(graph: Graph, model: nn.Module) -> Network:
    assert graph.program is not None
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return graph.program.network({name: t.detach() for name, t in tensors.items()}, frozenset(tensors))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# Ways to write a chain. A new layer adds a row.


def two(code: Callable[[Any, Tensor], Tensor]) -> Model:
    return Model(code, conv=nn.Conv2d(2, 3, 3), fc=nn.Linear(12, 1))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1, bias=False), nn.ELU(), nn.Sequential(nn.Conv2d(4, 2, 1)))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = torch.tanh(x)
        return self.head(x.view(x.size(0), -1))


CHAINS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "linear alone": (lambda: nn.Linear(4, 1), (4,), [""]),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1, False)), (4,), ["0", "2"]),
    "linear on positions": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.ELU(), nn.Flatten(), nn.Linear(18, 1)),
        (2, 3, 4),
        ["0", "3"],
    ),
    "linear over the last dimension of a picture": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.Linear(2, 5), nn.Conv2d(3, 2, (2, 1)), nn.Flatten(), nn.Linear(10, 1)
        ),
        (2, 4, 4),
        ["0", "1", "2", "4"],
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3, 2, 1), nn.SELU(), nn.Flatten(), nn.Linear(12, 1)),
        (2, 8),
        ["0", "3"],
    ),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, (3, 2), (2, 1), (1, 0), (1, 2), 2), nn.ReLU(), nn.Flatten(), nn.Linear(48, 1)
        ),
        (2, 6, 6),
        ["0", "3"],
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 2, 2, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(128, 1)),
        (2, 3, 3, 3),
        ["0", "3"],
    ),
    "padding same": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 2, (4, 3), padding="same", dilation=(1, 2)), nn.Tanh(), nn.Flatten(), nn.Linear(50, 1)
        ),
        (2, 5, 5),
        ["0", "3"],
    ),
    "padding valid": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 2, padding="valid"), nn.Flatten(), nn.Linear(32, 1)),
        (2, 5, 5),
        ["0", "2"],
    ),
    "convolution up to the end": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Softplus(2.0), nn.Conv2d(3, 1, 2)),
        (2, 4, 4),
        ["0", "2"],
    ),
    "nested modules": (Named, (2, 4, 4), ["features.0", "features.2.0", "head"]),
    "flatten": (lambda: two(lambda m, x: m.fc(torch.flatten(torch.relu(m.conv(x)), 1))), (2, 4, 4), ["conv", "fc"]),
    "view": (lambda: two(lambda m, x: m.fc(torch.sigmoid(m.conv(x)).view(-1, 12))), (2, 4, 4), ["conv", "fc"]),
    "reshape": (
        lambda: two(lambda m, x: m.fc(functional.elu(m.conv(x).reshape(x.shape[0], 12)))),
        (2, 4, 4),
        ["conv", "fc"],
    ),
    "reshape of the input": (
        lambda: two(lambda m, x: m.fc(m.conv(x.unflatten(1, (2, 4, 4))).flatten(1))),
        (32,),
        ["conv", "fc"],
    ),
    "squeeze of the output": (
        lambda: two(lambda m, x: m.fc(m.conv(x).flatten(1)).squeeze(-1)),
        (2, 4, 4),
        ["conv", "fc"],
    ),
    "unsqueeze and contiguous": (
        lambda: two(lambda m, x: m.fc(m.conv(x).unsqueeze(1).contiguous().clone().flatten(1))),
        (2, 4, 4),
        ["conv", "fc"],
    ),
    "functional calls": (
        lambda: two(
            lambda m, x: functional.linear(
                functional.leaky_relu(functional.conv2d(x, m.conv.weight, m.conv.bias), 0.3).flatten(1),
                m.fc.weight,
                m.fc.bias,
            )
        ),
        (2, 4, 4),
        ["conv2d", "linear"],
    ),
    "in place": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 1)),
        (2, 4, 4),
        ["0", "3"],
    ),
    "in place, result not used": (
        lambda: Model(
            lambda m, x: m.b((lambda z: (functional.relu_(z), z)[1])(m.a(x))), a=nn.Linear(4, 3), b=nn.Linear(3, 1)
        ),
        (4,),
        ["a", "b"],
    ),
    "dropout that is off": (
        lambda: nn.Sequential(
            nn.Dropout(),
            nn.Conv2d(2, 3, 3),
            nn.Dropout2d(),
            nn.SELU(),
            nn.AlphaDropout(),
            nn.Flatten(),
            nn.FeatureAlphaDropout(),
            nn.Dropout(inplace=True),
            nn.Linear(12, 1),
            nn.Dropout(),
        ).eval(),
        (2, 4, 4),
        ["1", "8"],
    ),
    "dropout of channels that is off, in place": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Dropout2d(inplace=True), nn.Flatten(), nn.Linear(12, 1)).eval(),
        (2, 4, 4),
        ["0", "3"],
    ),
    "dropout of nothing": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0), nn.Linear(3, 1)).train(),
        (4,),
        ["0", "2"],
    ),
    "a loop over modules": (
        lambda: Model(
            lambda m, x: [x := functional.tanh(part(x)) for part in m.parts] and m.last(x),
            parts=nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]),
            last=nn.Linear(4, 1),
        ),
        (4,),
        ["parts.0", "parts.1", "last"],
    ),
    "control flow on shapes": (
        lambda: Model(lambda m, x: m.a(x) if x.shape[-1] == 4 else m.a(-x), a=nn.Linear(4, 1)),
        (4,),
        ["a"],
    ),
    "order of use, not of definition": (
        lambda: Model(lambda m, x: m.a(torch.relu(m.b(x))), a=nn.Linear(3, 1), b=nn.Linear(4, 3)),
        (4,),
        ["b", "a"],
    ),
    "a layer that is not called": (
        lambda: Model(lambda m, x: m.b(x), a=nn.Linear(4, 3), b=nn.Linear(4, 1)),
        (4,),
        ["b"],
    ),
    "a buffer that counts calls": (
        lambda: Model(
            lambda m, x: (m.n.num_batches_tracked.add_(1), m.a(x))[1], n=nn.BatchNorm1d(4), a=nn.Linear(4, 1)
        ),
        (4,),
        ["a"],
    ),
}


def agrees(graph: Graph, model: nn.Module, shape: tuple[int, ...]) -> None:
    """The output, and the gradients of all parameters, with torch as the judge."""
    network = network_of(graph, model)
    assert [layer.name for layer in network.layers] == [use.name for use in graph.uses]
    for x in torch.randn(2, 1, *shape, dtype=torch.float64):
        result = model(x)
        trained = dict(model.named_parameters())
        gradients = torch.autograd.grad(result.sum(), list(trained.values()), allow_unused=True)
        expected = {name: g for name, g in zip(trained, gradients, strict=True) if g is not None}
        values = network.forward(x)
        torch.testing.assert_close(values[-1].flatten(), result.detach().flatten(), rtol=1e-10, atol=1e-12)
        ks = network.vjp(values, network.slopes(values), {len(values) - 1: torch.ones_like(values[-1])})
        for node, k in zip(network.nodes, ks[1:], strict=True):
            if not isinstance(node.op, Linear):
                continue
            layer, signal = node.op.layer, node.op.layer.pack_output(k)
            found = layer.grad_weight(layer.pack_input(values[node.reads[0]]), signal)
            want = expected.pop(layer.weight_name)
            torch.testing.assert_close(found.flatten(), layer.pack_weight(want[None]).flatten(), rtol=1e-9, atol=1e-12)
            if layer.bias_name is not None:
                torch.testing.assert_close(signal.sum((0, 2)), expected.pop(layer.bias_name), rtol=1e-9, atol=1e-12)
        assert not expected


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("row", CHAINS)
def test_a_chain_computes_what_the_module_computes(row: str) -> None:
    make, shape, names = CHAINS[row]
    model = make().double()
    graph = plain(model, shape)
    # An operation outside of any module goes by its own name, with a number where that is taken.
    assert [use.name.removesuffix("_1") for use in graph.uses] == [name or "linear" for name in names]
    agrees(graph, model, shape)


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: m.b((lambda z: (torch.relu(z), z)[1])(m.a(x))),
        lambda m, x: m.b((lambda z: (functional.relu_(z.view(3)), z)[1])(m.a(x))),
        lambda m, x: m.c((m.a(x), x)[1]),
        lambda m, x: m.b((lambda z: (m.b(z), torch.tanh(z))[1])(m.a(x))),
    ],
    ids=["activation", "activation of a view, in place", "layer", "layer that is used again"],
)
def test_results_that_are_not_used_are_left_out_or_refused(code: Callable[[Any, Tensor], Tensor]) -> None:
    model = Model(code, a=nn.Linear(4, 3), b=nn.Linear(3, 1), c=nn.Linear(4, 1)).double()
    target = Target(model, losses.Logistic(), (4,))
    try:
        _ = target.network
    except NotImplementedError:  # what is written through a view is not seen
        return
    if not target.obstacles:
        agrees(target.graph, model, (4,))


def test_layers_keep_the_names_that_gradients_come_under() -> None:
    uses = plain(Named(), (2, 4, 4)).uses
    assert [(use.weight_name, use.bias_name) for use in uses] == [
        ("features.0.weight", None),
        ("features.2.0.weight", "features.2.0.bias"),
        ("head.weight", "head.bias"),
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_precision_is_followed(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)
    network = network_of(plain(model, (4,)), model)
    assert torch.equal(network.layers[0].weight[0], model[0].weight.detach().double())


@pytest.mark.parametrize("outputs", [3, None])
def test_a_loss_may_take_several_outputs(outputs: int | None) -> None:
    graph = plain(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (4,), outputs)
    assert graph.uses[-1].outputs == 3


# Activations. A new one adds a row.

ACTIVATIONS: dict[str, tuple[nn.Module | Callable[[Tensor], Tensor], Activation]] = {
    "Identity": (nn.Identity(), Identity()),
    "LeakyReLU": (nn.LeakyReLU(), LeakyReLU(0.01)),
    "LeakyReLU(0.3)": (nn.LeakyReLU(0.3), LeakyReLU(0.3)),
    "LeakyReLU(0)": (nn.LeakyReLU(0.0), ReLU()),
    "LeakyReLU in place": (nn.LeakyReLU(0.3, inplace=True), LeakyReLU(0.3)),
    "leaky_relu": (lambda z: functional.leaky_relu(z, 0.3), LeakyReLU(0.3)),
    "RReLU": (nn.RReLU(0.2, 0.4).eval(), LeakyReLU((0.2 + 0.4) / 2)),
    "ReLU": (nn.ReLU(), ReLU()),
    "ReLU in place": (nn.ReLU(inplace=True), ReLU()),
    "relu": (torch.relu, ReLU()),
    "Sigmoid": (nn.Sigmoid(), Sigmoid()),
    "sigmoid": (functional.sigmoid, Sigmoid()),
    "sigmoid in place": (torch.sigmoid_, Sigmoid()),
    "Tanh": (nn.Tanh(), Tanh()),
    "tanh": (lambda z: z.tanh(), Tanh()),
    "tanh in place": (torch.tanh_, Tanh()),
    "Softplus": (nn.Softplus(), Softplus(1.0, 20.0)),
    "Softplus(3, 25)": (nn.Softplus(3.0, 25.0), Softplus(3.0, 25.0)),
    "LogSigmoid": (nn.LogSigmoid(), LogSigmoid()),
    "CELU(0.5)": (nn.CELU(0.5), ELU(0.5, 1.0, 2.0)),
    "ELU": (nn.ELU(), ELU(1.0)),
    "ELU(0.5)": (nn.ELU(0.5), ELU(0.5)),
    "ELU in place": (nn.ELU(2.0, inplace=True), ELU(2.0)),
    "SELU": (nn.SELU(), SELU),
    "SELU in place": (nn.SELU(inplace=True), SELU),
}


@pytest.mark.parametrize("row", ACTIVATIONS)
def test_an_activation_is_recognised(row: str) -> None:
    code, expected = ACTIVATIONS[row]
    uses = plain(inner(code), (2, 4, 4)).uses
    assert [use.activation for use in uses] == [expected, Identity()]
    z = torch.linspace(-30, 30, 241, dtype=torch.float64)
    torch.testing.assert_close(uses[0].activation(z), code(z.clone()), rtol=1e-12, atol=1e-15)


def test_every_activation_of_the_table_has_a_row() -> None:
    names = ("negative_slope", "beta", "threshold", "alpha", "scale", "input_scale", "lower", "upper")
    settings = dict(zip(names, (0.1, 1, 20, 1, 1, 1, 0.1, 0.3), strict=True))
    assert {type(activation) for _, activation in ACTIVATIONS.values()} >= {
        type(make(settings)) for name, make in KNOWN_ACTIVATIONS.items() if not known(name)
    }


# Obstacles between two layers. A new entry of the table adds a row.


@dataclass(frozen=True)
class Row:
    code: Callable[[Tensor], Any]
    what: str
    kind: Kind
    remedy: str


ROUTES = "where its maxima come from is found if the layer in front has enough rows for it"
MEANS = "what it averages is found if the layer in front has enough rows for it"
FLATTENED = "replace it by a flatten and a Linear layer"
REORDERED = "reordering is not followed; use flatten or reshape only"
CALL = "write it as torch.nn.functional.linear"
PLAIN = "ranks are measured where nothing but activations, batch norm and reordering stands between the layers"
TWICE = "has two inputs for one output; use LeakyReLU, ELU or Softplus to attack this model"
NO_RULE = "no rule for it; replace it or attack the part of the model after it"
SKIPS = "skip connections and added constants are not followed; attack the model without them"
NORMS = "attack the model without its normalisation layers"
EVAL = "call model.eval() first"
RAW = "give the loss the raw outputs"
PAD = "use the padding argument of the convolution, with zeros"
ONE = "one activation after each layer is followed"

OBSTACLES: dict[str, Row] = {
    "add": Row(lambda z: z + 1, "add", Kind.PASSED, PLAIN),
    "add of two": Row(lambda z: z + z.flatten(1).reshape(z.shape), "add of 2 values", Kind.PASSED, PLAIN),
    "cat": Row(lambda z: torch.cat([z, z.clone()], 1), "cat of 2 values", Kind.PASSED, PLAIN),
    "max_pool1d": Row(lambda z: functional.max_pool1d(z.flatten(2), 2), "max_pool1d", Kind.PASSED, ROUTES),
    "max_pool2d": Row(nn.MaxPool2d(2), "max_pool2d", Kind.PASSED, ROUTES),
    "max_pool3d": Row(lambda z: functional.max_pool3d(z[:, None], 2), "max_pool3d", Kind.PASSED, ROUTES),
    "adaptive_max_pool1d": Row(
        lambda z: functional.adaptive_max_pool1d(z.flatten(2), 2), "adaptive_max_pool1d", Kind.PASSED, ROUTES
    ),
    "adaptive_max_pool2d": Row(nn.AdaptiveMaxPool2d(2), "adaptive_max_pool2d", Kind.PASSED, ROUTES),
    "adaptive_max_pool3d": Row(
        lambda z: functional.adaptive_max_pool3d(z[:, None], 1), "adaptive_max_pool3d", Kind.PASSED, ROUTES
    ),
    "avg_pool1d": Row(lambda z: functional.avg_pool1d(z.flatten(2), 2), "avg_pool1d", Kind.PASSED, MEANS),
    "avg_pool2d": Row(nn.AvgPool2d(2), "avg_pool2d", Kind.PASSED, MEANS),
    "avg_pool3d": Row(lambda z: functional.avg_pool3d(z[:, None], 2), "avg_pool3d", Kind.PASSED, MEANS),
    "adaptive_avg_pool1d": Row(
        lambda z: functional.adaptive_avg_pool1d(z.flatten(2), 2), "adaptive_avg_pool1d", Kind.PASSED, MEANS
    ),
    "adaptive_avg_pool2d": Row(nn.AdaptiveAvgPool2d(1), "adaptive_avg_pool2d", Kind.PASSED, MEANS),
    "adaptive_avg_pool3d": Row(
        lambda z: functional.adaptive_avg_pool3d(z[:, None], 2), "adaptive_avg_pool3d", Kind.PASSED, MEANS
    ),
    "mean": Row(lambda z: z.mean(2), "mean", Kind.NOT_YET, FLATTENED),
    "mean of all places": Row(lambda z: z.mean((2, 3)), "mean", Kind.PASSED, MEANS),
    "mean of all places, kept": Row(lambda z: z.mean((-1, -2), keepdim=True), "mean", Kind.PASSED, MEANS),
    "permute": Row(lambda z: z.permute(0, 2, 3, 1), "permute", Kind.PASSED, PLAIN),
    "transpose": Row(lambda z: z.transpose(2, 3), "transpose", Kind.PASSED, PLAIN),
    "matmul": Row(lambda z: z @ torch.ones(4, 3), "matmul", Kind.PASSED, PLAIN),
    "mm": Row(lambda z: torch.mm(z.flatten(1), torch.ones(32, 3)), "mm", Kind.PASSED, PLAIN),
    "addmm": Row(lambda z: torch.addmm(torch.ones(3), z.flatten(1), torch.ones(32, 3)), "addmm", Kind.PASSED, PLAIN),
    "pad": Row(nn.ZeroPad2d(1), "pad", Kind.PASSED, PLAIN),
    "pad by reflection": Row(nn.ReflectionPad2d(1), "pad", Kind.PASSED, PLAIN),
    "gelu": Row(nn.GELU(), "gelu", Kind.PASSED, PLAIN),
    "silu": Row(nn.SiLU(), "silu", Kind.PASSED, PLAIN),
    "silu in place": Row(nn.SiLU(inplace=True), "silu", Kind.PASSED, PLAIN),
    "mish": Row(nn.Mish(), "mish", Kind.PASSED, PLAIN),
    "hardswish": Row(nn.Hardswish(), "hardswish", Kind.PASSED, PLAIN),
    "hardtanh": Row(nn.Hardtanh(), "hardtanh", Kind.PASSED, PLAIN),
    "hardsigmoid": Row(nn.Hardsigmoid(), "hardsigmoid", Kind.PASSED, PLAIN),
    "clamp": Row(lambda z: z.clamp(0, 1), "clamp", Kind.NEVER, "clamps values away"),
    "softmax": Row(nn.Softmax(1), "softmax", Kind.SETTING, RAW),
    "log_softmax": Row(nn.LogSoftmax(1), "log_softmax", Kind.SETTING, RAW),
    "abs": Row(torch.abs, "abs", Kind.NEVER, "loses the sign of every value"),
    "prelu": Row(nn.PReLU(), "prelu", Kind.PASSED, "positive"),
    "square": Row(torch.square, "square", Kind.NEVER, "loses the sign of every value"),
    "pow": Row(lambda z: z**2, "pow", Kind.NEVER, "may lose the sign of every value"),
    "sign": Row(torch.sign, "sign", Kind.NEVER, "keeps nothing but signs, and its gradient is zero"),
    "round": Row(torch.round, "round", Kind.NEVER, "its gradient is zero"),
    "floor": Row(torch.floor, "floor", Kind.NEVER, "its gradient is zero"),
    "detach": Row(lambda z: z.detach(), "detach", Kind.NEVER, "stops the gradient"),
    "to": Row(lambda z: z.half().float(), "a cast to float16", Kind.NOT_YET, "what it rounds is not followed"),
    "argmax": Row(lambda z: z.argmax(1, keepdim=True) * z, "argmax", Kind.NEVER, "its gradient is zero"),
    "without a rule": Row(lambda z: z.flip(1), "flip", Kind.PASSED, PLAIN),
    "without a rule, of two": Row(lambda z: z * z.clone(), "mul of 2 values", Kind.PASSED, PLAIN),
    "transposed convolution": Row(nn.ConvTranspose2d(2, 2, 2), "conv_transpose2d", Kind.PASSED, PLAIN),
    "wrap_with_set_grad_enabled": Row(
        torch.no_grad()(lambda z: z * 2), "wrap_with_set_grad_enabled", Kind.SETTING, "compute them with gradients"
    ),
    "wrap_with_autocast": Row(
        torch.autocast("cpu", torch.bfloat16)(lambda z: z * 2), "wrap_with_autocast", Kind.SETTING, "without autocast"
    ),
    "dropout": Row(nn.Dropout(), "dropout in training mode", Kind.SETTING, EVAL),
    "dropout of channels": Row(nn.Dropout2d(), "dropout in training mode", Kind.SETTING, EVAL),
    "dropout in place": Row(nn.Dropout(inplace=True), "dropout in training mode", Kind.SETTING, EVAL),
    "dropout of channels in place": Row(nn.Dropout2d(inplace=True), "dropout in training mode", Kind.SETTING, EVAL),
    "alpha dropout": Row(nn.AlphaDropout(), "dropout in training mode", Kind.SETTING, EVAL),
    "alpha dropout of channels": Row(nn.FeatureAlphaDropout(), "dropout in training mode", Kind.SETTING, EVAL),
    "batch norm in training": Row(
        nn.BatchNorm2d(2), "batch_norm in training mode mixes the samples of a batch", Kind.SETTING, EVAL
    ),
    "batch norm": Row(nn.BatchNorm2d(2).eval(), "batch_norm", Kind.PASSED, PLAIN),
    "layer norm": Row(nn.LayerNorm(4), "layer_norm", Kind.NOT_YET, NORMS),
    "group norm": Row(nn.GroupNorm(1, 2), "group_norm", Kind.NOT_YET, NORMS),
    "rms norm": Row(nn.RMSNorm(4), "rms_norm", Kind.NOT_YET, NORMS),
    "instance norm with statistics": Row(
        nn.InstanceNorm2d(2, track_running_stats=True).eval(), "instance_norm", Kind.NOT_YET, NORMS
    ),
    "leaky_relu that folds": Row(
        nn.LeakyReLU(-0.5),
        "leaky_relu with negative slope -0.5",
        Kind.NEVER,
        "has two inputs for one output; use a positive slope",
    ),
    "elu that folds": Row(nn.ELU(-0.5), "elu with alpha -0.5", Kind.NEVER, "use a positive alpha"),
    "elu that is flat": Row(nn.ELU(0.0), "elu with alpha 0", Kind.NEVER, "use a positive alpha"),
    "two activations": Row(
        nn.Sequential(nn.Tanh(), nn.Sigmoid()), "sigmoid on the input, or on another activation", Kind.PASSED, PLAIN
    ),
}


# These bring obstacles of their own along: constants for weights, helpers, layers whose gradient is cut off.
WITH_MORE = {
    "matmul", "mm", "addmm", "transposed convolution", "detach", "argmax", "wrap_with_set_grad_enabled",
    "wrap_with_autocast", "to",
}  # fmt: skip


@pytest.mark.parametrize("row", OBSTACLES)
def test_an_obstacle_is_named_with_its_kind_and_remedy(row: str) -> None:
    expected = OBSTACLES[row]
    found = obstacles(inner(expected.code), (2, 4, 4))
    (named,) = (obstacle for obstacle in found if obstacle.what == expected.what)
    assert named.kind is expected.kind
    assert expected.remedy.lower() in named.remedy.lower()
    assert named.remedy[0].isupper()
    assert named.remedy.endswith(".")
    if row not in WITH_MORE:
        assert found == (named,)


def test_every_known_obstacle_has_a_row() -> None:
    common = {"add", "cat", "permute", "transpose", "matmul", "mm", "addmm", "pad", "gelu", "silu", "mish", "hardtanh"}
    assert set(KNOWN) - FOLLOWED | common <= set(OBSTACLES)


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False)], ids=["instance", "batch"]
)
def test_a_norm_without_statistics_is_not_helped_by_eval(norm: nn.Module) -> None:
    (found,) = obstacles(inner(norm.eval()).eval(), (2, 4, 4))
    assert "eval()" not in found.remedy
    assert found.kind is Kind.NOT_YET


@pytest.mark.parametrize("softplus", [nn.Softplus(-1.0), nn.Softplus(1.0, 1.0)], ids=["falling", "with a step"])
def test_a_softplus_with_odd_settings_is_inverted_or_refused(softplus: nn.Softplus) -> None:
    """Below 0 beta turns it over; at a low threshold it steps down, so that two inputs have one output."""
    z = torch.linspace(-3, 3, 601, dtype=torch.float64)[None, None]
    try:
        activation = plain(inner(softplus), (2, 4, 4)).uses[0].activation
    except NotAChain:
        return
    x = softplus(z)
    assert activation.nonnegative == bool((x >= 0).all())
    found = activation.invert(x, torch.zeros(1, dtype=torch.float64))
    known = torch.ones_like(z, dtype=torch.bool) if found.weight is None else found.weight > 0
    torch.testing.assert_close(found.z[known], z[known], rtol=1e-6, atol=1e-6)


# Obstacles at the ends and in the parameters.


def shared_weight() -> nn.Module:
    return Model(lambda m, x: m.b(torch.relu(m.a(torch.relu(m.a(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 1))


def tied_weight() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    model[2].weight = model[0].weight
    return model


def frozen(*names: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


COMPUTED = "use plain parameters"
SECOND = "a Linear layer that reads the batch as its second dimension, as in torch's attention"
ENDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[tuple[str, str, Kind, str]]]] = {
    "shared module": (
        shared_weight,
        (4,),
        [
            ("a", "a.weight is used more than once", Kind.NOT_YET, "its gradient is a sum over its uses"),
            ("a", "a.bias is used more than once", Kind.NOT_YET, "its gradient is a sum over its uses"),
        ],
    ),
    "tied weight": (
        tied_weight,
        (4,),
        [("2", "0.weight is used more than once", Kind.NOT_YET, "its gradient is a sum over its uses")],
    ),
    "frozen weight": (
        lambda: frozen("0.weight"),
        (4,),
        [("0", "0.weight is frozen", Kind.SETTING, "set requires_grad")],
    ),
    "frozen bias": (lambda: frozen("2.bias"), (4,), [("2", "2.bias is frozen", Kind.SETTING, "set requires_grad")]),
    "weight from a parametrisation": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 1))),
        (4,),
        [("0", "its weight is computed, not a parameter", Kind.NOT_YET, COMPUTED)],
    ),
    "computed bias": (
        lambda: Model(lambda m, x: functional.linear(x, m.a.weight, m.a.bias * 2), a=nn.Linear(4, 1)),
        (4,),
        [("linear", "its bias is computed, not a parameter", Kind.NOT_YET, COMPUTED)],
    ),
    "constant weight": (
        lambda: Model(lambda m, x: m.a(functional.linear(x, torch.ones(4, 4))), a=nn.Linear(4, 1)),
        (4,),
        [("linear", "its weight is computed, not a parameter", Kind.NOT_YET, COMPUTED)],
    ),
    "computed weight of a convolution": (
        lambda: Model(
            lambda m, x: m.b(functional.conv1d(x, m.a.weight * 2, m.a.bias).flatten(1)),
            a=nn.Conv1d(1, 1, 2),
            b=nn.Linear(3, 1),
        ),
        (1, 4),
        [("conv1d", "its weight is computed, not a parameter", Kind.NOT_YET, COMPUTED)],
    ),
    "weight from the input": (
        lambda: Model(lambda m, x: m.b(functional.linear(x, m.a(x).view(4, 4))), a=nn.Linear(4, 16), b=nn.Linear(4, 1)),
        (4,),
        [("linear_1", "linear of 2 values", Kind.NOT_YET, NO_RULE)],
    ),
    "activation on the input": (
        lambda: nn.Sequential(nn.ReLU(), nn.Linear(4, 1)),
        (4,),
        [("0", "relu on the input, or on another activation", Kind.PASSED, PLAIN)],
    ),
    "activation after the last layer": (
        lambda: nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()),
        (4,),
        [("0", "sigmoid after the last layer", Kind.SETTING, "the loss takes the raw output; remove the activation")],
    ),
    "two outputs": (
        lambda: nn.Sequential(nn.Linear(4, 2)),
        (4,),
        [("0", "2 outputs a sample, the loss takes 1", Kind.SETTING, "give the model a single output")],
    ),
    "outputs at several positions": (
        lambda: nn.Sequential(nn.Linear(4, 1)),
        (3, 4),
        [("0", "3 outputs a sample, the loss takes 1", Kind.SETTING, "give the model a single output")],
    ),
    "no layer": (
        lambda: nn.Flatten(),
        (4,),
        [("forward", "no Linear or convolutional layer", Kind.SETTING, "there is no gradient to attack")],
    ),
    "nothing but an obstacle": (
        lambda: nn.MaxPool2d(2),
        (4, 4, 4),
        [("max_pool2d", "max_pool2d", Kind.PASSED, ROUTES)],
    ),
    "a pair without a usual name": (
        lambda: Model(lambda m, x: {"a": m.a(x), "b": m.b(x)}, a=nn.Linear(4, 1), b=nn.Linear(4, 1)),
        (4,),
        [("forward", "returns 2 values", Kind.SETTING, "return one tensor of outputs")],
    ),
    "linear behind a transposed batch": (
        lambda: Model(lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1), a=nn.Linear(4, 1)),
        (3, 4),
        [
            ("transpose", "transpose", Kind.PASSED, "ranks are measured"),
            ("a", SECOND, Kind.NOT_YET, "attack the part"),
            ("transpose_1", "transpose", Kind.PASSED, "ranks are measured"),
            ("a", "3 outputs a sample, the loss takes 1", Kind.SETTING, "single output"),
        ],
    ),
    "linear without a batch": (
        lambda: Model(lambda m, x: m.a(x.squeeze(0)), a=nn.Linear(4, 1)),
        (4,),
        [("a", "a Linear layer whose first dimension is not the batch", Kind.SETTING, "keep the batch in front")],
    ),
}


@pytest.mark.parametrize("row", ENDS)
def test_an_obstacle_at_the_ends_or_in_the_parameters(row: str) -> None:
    make, shape, expected = ENDS[row]
    found = obstacles(make(), shape)
    assert [(o.where, o.what, o.kind) for o in found] == [line[:3] for line in expected]
    for obstacle, (*_, remedy) in zip(found, expected, strict=True):
        assert remedy.lower() in obstacle.remedy.lower()


@pytest.mark.parametrize(
    ("code", "count"),
    [
        (lambda m, x: (m.a(x),), 1),
        (lambda m, x: [m.a(x)], 1),
        (lambda m, x: {"logits": m.a(x)}, 1),
        (lambda m, x: {"loss": x.sum(), "logits": m.a(x)}, 2),
        (lambda m, x: {"aux": 2 * x, "out": m.a(x)}, 2),
        (lambda m, x: {"scores": m.a(x)}, 1),
        (lambda m, x: (m.a(x), None), 1),
        (lambda m, x: ((m.a(x), x), {"hidden": x}), 3),
        (lambda m, x: (m.a(x), m.a.weight), 2),
    ],
)
def test_the_outputs_are_found_among_what_a_model_returns(code: Callable[[Any, Tensor], Any], count: int) -> None:
    model = Model(code, a=nn.Linear(4, 1))
    graph = follow(model, (4,), 1)
    assert (graph.obstacles, [use.name for use in graph.uses], graph.returned) == ((), ["a"], count)
    x = torch.rand(2, 4)
    assert torch.equal(outputs_of(model(x)), model.a(x))


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: m.a.weight.sum(),
        lambda m, x: {"first": m.a(x), "second": x},
        lambda m, x: (None, m.a(x)),
    ],
    ids=["a weight", "no usual name", "None first"],
)
def test_what_cannot_be_told_for_outputs_is_refused(code: Callable[[Any, Tensor], Any]) -> None:
    """The loss takes a tensor."""
    found = obstacles(Model(code, a=nn.Linear(4, 1)), (4,))
    assert [(o.where, o.kind) for o in found] == [("forward", Kind.SETTING)]
    assert "eturn one tensor" in found[0].remedy


@pytest.mark.parametrize(
    ("end", "name"),
    [
        (lambda z: torch.log_softmax(z, 1), "log_softmax"),
        (lambda z: nn.functional.log_softmax(z, dim=-1).reshape(-1, 3), "log_softmax"),
        (torch.sigmoid, "sigmoid"),
        (lambda z: z.softmax(1), "softmax"),
        (lambda z: z.softmax(0), ""),
        (lambda z: 2 * torch.sigmoid(z), ""),
        (lambda z: z, ""),
    ],
)
def test_what_a_model_ends_in_may_belong_to_the_loss(end: Callable[[Tensor], Tensor], name: str) -> None:
    model = Model(lambda m, x: end(m.a(x)), a=nn.Linear(4, 3))
    assert follow(model, (4,), 3).ending == name
    taken = follow(model, (4,), 3, name or "sigmoid")
    assert taken.ending_is_the_loss is bool(name)
    if name:
        assert taken.obstacles == ()


@pytest.mark.parametrize(
    ("code", "first", "shape"),
    [
        (lambda m, x: m.b(m.a(x.view(3, 4)).view(1, 6)), lambda: nn.Linear(4, 2), (12,)),
        (lambda m, x: m.b(m.a(x.flatten(0, 1)).view(1, 6)), lambda: nn.Linear(4, 2), (3, 4)),
        (lambda m, x: m.b(m.a(x.view(2, 2, 2, 2)).view(1, 6)), lambda: nn.Conv2d(2, 3, 2), (4, 2, 2)),
        (lambda m, x: m.b(m.a(x.squeeze(0)).view(1, 6)), lambda: nn.Conv2d(1, 6, 2), (1, 2, 2)),
    ],
    ids=["view", "flatten", "parts of a picture", "without a batch"],
)
def test_code_that_takes_the_batch_for_something_else_is_refused(
    code: Callable[[Any, Tensor], Tensor], first: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """What becomes of the batch is not what becomes of one sample: such code works on one sample only by chance."""
    found = obstacles(Model(code, a=first(), b=nn.Linear(6, 1)), shape)
    assert any(o.where == "a" for o in found)


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: m.a(x) if x.sum() > 0 else m.a(-x),
        lambda m, x: m.a(x * int(x.sum())),
        lambda m, x: m.a(x[:, : 1 + int(x.argmax())].sum(1, keepdim=True).expand(-1, 4)),
    ],
    ids=["branch", "number", "size"],
)
def test_control_flow_on_the_values_is_refused(
    code: Callable[[Any, Tensor], Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    (found,) = obstacles(Model(code, a=nn.Linear(4, 1)), (4,))
    assert (found.where, found.kind) == ("forward", Kind.NOT_YET)
    assert found.what.startswith("cannot be traced: ")
    assert "\n" not in found.what
    assert "guard" not in found.what
    assert "depends on the values of the input" in found.remedy
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), (1, 4, 4)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), (1, 8, 8)),
        (nn.Sequential(nn.Flatten(), nn.Unflatten(1, (3, 4)), nn.Linear(4, 2)), (1, 4, 4)),
        (nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2)), (6,)),
    ],
)
def test_of_a_wrong_shape_torch_prints_nothing(
    model: nn.Module, shape: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    before = logging.root.manager.disable
    graph = follow(model.eval(), shape, outputs=None)
    assert not graph.uses
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert logging.root.manager.disable == before


@pytest.mark.parametrize(
    "code",
    [
        lambda h: h + torch.from_numpy(h.detach().numpy()),
        lambda h: h * float(h.detach().numpy().max()),
        lambda h: h + torch.as_tensor(h.detach().numpy().copy()),
    ],
    ids=["numpy", "number", "copy"],
)
def test_other_code_is_not_taken_for_control_flow(code: Callable[[Tensor], Tensor]) -> None:
    (found,) = obstacles(Model(lambda m, x: m.b(code(m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 1)), (4,))
    assert found.what.startswith("cannot be traced: ")
    assert found.remedy == "Keep to torch's own operations in the model's forward."


@pytest.mark.parametrize(
    "cast",
    [
        lambda h: h.float(),
        lambda h: h.to(h.dtype),
        lambda h: h.double().float(),
        lambda h: h.type_as(h),
        lambda h: h.to("cpu"),
    ],
    ids=["float", "own type", "double and back", "type of itself", "device"],
)
def test_a_cast_that_loses_nothing_is_passed(cast: Callable[[Tensor], Tensor]) -> None:
    model = Model(lambda m, x: m.b(torch.tanh(cast(m.a(x)))), a=nn.Linear(4, 6), b=nn.Linear(6, 1))
    assert plain(model, (4,)).uses
    x = torch.rand(3, 4)
    network = Target(model.eval(), losses.Logistic(), (4,)).network
    torch.testing.assert_close(network.forward(x.double())[-1].float(), model(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.LayerNorm(6), nn.Dropout(0.5)], ids=["batch", "layer", "none"])
def test_what_is_written_part_by_part_is_all_that_such_a_model_is_told_of(norm: nn.Module, training: bool) -> None:
    def code(m: Any, x: Tensor) -> Tensor:
        h = m.norm(m.a(x))
        out = torch.zeros_like(h)
        out[:, :2], out[:, 2:] = h[:, :2], 2 * h[:, 2:]
        found: Tensor = m.b(out)
        return found

    graph = follow(Model(code, a=nn.Linear(4, 6), norm=norm, b=nn.Linear(6, 1)).train(training), (4,))
    assert [use.name for use in graph.uses] == ["a", "b"]
    assert all(each.where not in ("a", "b", "forward") or "mode" in each.what for each in graph.obstacles)


def test_all_obstacles_of_a_model_are_listed_at_once() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.GELU(),
        nn.Dropout(), nn.Flatten(), nn.Linear(16, 2), nn.Tanh(), nn.Softmax(1),
    )  # fmt: skip
    model[4].weight.requires_grad_(False)
    model.train()
    with pytest.raises(NotAChain) as refused:
        plain(model, (2, 4, 4))
    expected = [
        ("1", "batch_norm in training mode mixes the samples of a batch"),
        ("3", "max_pool2d"),
        ("4", "4.weight is frozen"),
        ("5", "gelu"),
        ("6", "dropout in training mode"),
        ("10", "softmax"),
        ("8", "tanh after the last layer"),
        ("8", "2 outputs a sample, the loss takes 1"),
    ]
    assert [(o.where, o.what) for o in refused.value.obstacles] == expected
    message = str(refused.value)
    assert "8 obstacle(s)" in message
    for obstacle in refused.value.obstacles:
        assert str(obstacle) in message


# What tracing leaves behind: nothing.


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "identities": {name: id(t) for name, t in model.state_dict(keep_vars=True).items()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("ending", ["a chain", "an obstacle", "an error"])
def test_tracing_leaves_the_model_as_it_was(ending: str, training: bool) -> None:
    def code(m: Any, x: Tensor) -> Tensor:
        if ending == "an error" and x.sum() > 0:
            x = -x
        x = m.conv(x)
        if ending == "an obstacle":
            x = m.norm(x)
        return m.fc(torch.relu(x).flatten(1))

    model = Model(code, conv=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2), fc=nn.Linear(8, 1)).train(training)
    model.conv.train(not training)  # the mode of each module, not of the whole
    model(torch.randn(2, 1, 4, 4)).sum().backward()
    model.fc.bias.requires_grad_(True)
    before, random = snapshot(model), torch.get_rng_state()
    values = copy.deepcopy(model.state_dict())
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    enabled = torch.is_grad_enabled()
    if ending == "a chain":
        assert [type(use) for use in plain(model, (1, 4, 4)).uses] == [Use, Use]
    else:
        obstacles(model, (1, 4, 4))
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled() == enabled
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]), name
    for name, parameter in model.named_parameters():
        gradient = gradients[name]
        if gradient is None:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, gradient), name


def test_training_on_does_not_change_the_network() -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    network = network_of(plain(model, (4,)), model)
    before = network.layers[0].weight.clone()
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(network.layers[0].weight, before)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_batch_norm_in_training_mode_that_refuses_one_sample_is_followed(norm: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), norm(4), nn.GELU(), nn.Linear(4, 1)).train()
    with pytest.raises(NotAChain) as caught:
        plain(model, (4,))
    found, *_ = caught.value.obstacles  # the others are behind it
    assert found.kind is Kind.SETTING
    assert found.what == "batch_norm in training mode mixes the samples of a batch"
    assert "model.eval()" in found.remedy
    assert all(module.training for module in model.modules())


def test_a_norm_without_statistics_that_refuses_one_sample_is_an_obstacle() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1)).train()
    with pytest.raises(NotAChain, match="more than 1 value per channel"):
        plain(model, (4,))
