"""Does this update belong to this model, loss, shape and mode? Asked before any attack, from the gradient alone.

For activations with f(a z) = a f(z), <k_i, z_i> of one layer is <W, grad W> of the next (Eq. 10). So

    <W_i, grad W_i> + sum over the layers j >= i of <b_j, grad b_j>  =  mu * dl/dmu

in every layer i. An update that was taken at other weights, or changed in one layer, breaks the equality there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rgap.inversion.root import leading_pair
from rgap.inversion.subspace.head import ranks
from rgap.nn.layers import Layer
from rgap.nn.losses import MarginLoss
from rgap.nn.models import exported_modes
from rgap.nn.network import Network
from rgap.target import Target
from rgap.update import Update

_DROPOUT, _NORM = "dropout", "batch norm"
FILLED = 0.05
"""Samples that fill a smaller share of the value range were probably meant for another one."""


def changes_with_mode(model: nn.Module) -> tuple[str, ...]:
    """What in a model computes something else in training mode."""
    modules = list(model.modules())
    dropout = any(isinstance(each, nn.modules.dropout._DropoutNd) and each.p > 0 for each in modules)
    norm = any(isinstance(each, nn.modules.batchnorm._NormBase) for each in modules)
    names = exported_modes(model) or {}
    dropout = dropout or any("dropout" in name for name in names)
    norm = norm or any("norm" in name for name in names)
    return (*[_DROPOUT] * dropout, *[_NORM] * norm)


def range_misfit(target: Target, samples: Sequence[Tensor]) -> str | None:
    """What is wrong with the value range for these samples, in a sentence; None if they fill it and keep to it."""
    if target.value_range is None:
        return None
    low, high = target.value_range
    least, most = min(float(x.min()) for x in samples), max(float(x.max()) for x in samples)
    slack = 1e-6 * (high - low)
    if low - slack <= least and most <= high + slack and (most - least >= FILLED * (high - low) or most == least):
        return None
    return (
        f"The samples' values go from {least:.3g} to {most:.3g}, and the value range is {low:g} to {high:g}: attacks "
        "that keep to it cannot find them, and what is recovered is judged by it. Give the range that the model's "
        f"inputs have (--value-range {least:.3g},{most:.3g}), or what clients do before the model (--mean, --std)."
    )


RANK = 30.0
"""So many times its rounding may be left of one sample's gradient besides its leading singular pair."""


@dataclass(frozen=True)
class Preflight:
    """What was checked, and every finding in a sentence; no findings is a pass."""

    findings: tuple[str, ...]
    products: tuple[tuple[str, float], ...]
    """By layer, the product that Eq. 10 says is mu * dl/dmu in all of them."""

    @property
    def passed(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        return "\n".join(self.findings) or "the update fits the model"


def preflight(target: Target, update: Update) -> Preflight:
    """Compare an update with the target; never raises for an update that `Update.check` accepts."""
    findings = [*_header(target, update), *_values(update), *_rank(target, update)]
    contradicted = batch_size_misfit(target, update) if update.samples(target) > 1 else None
    findings += [] if contradicted is None else [contradicted]
    products: tuple[tuple[str, float], ...] = ()
    whole = all(name in update.gradients for name in target.parameters)
    network = _chain(target) if whole and update.norm > 0 else None
    if network is not None:
        products, noise = _products(network.layers, update)
        if isinstance(target.loss, MarginLoss):
            findings += _last_layer(target, update, products[-1][1], noise[-1])
        else:
            findings += _scale(target, network.layers[-1], update)
        if network.homogeneous:
            findings += _equal_products(products, noise)
    return Preflight(tuple(findings), products)


def _chain(target: Target) -> Network | None:
    """The network if it is a plain chain whose operations are all known."""
    try:
        return None if target.obstacles else target.network
    except NotImplementedError:
        return None


def _header(target: Target, update: Update) -> list[str]:
    header, findings = update.header, []
    client = None if header.training is None else "training" if header.training else "evaluation"
    changing = changes_with_mode(target.model)
    if client not in (None, target.mode) and changing:
        exported = exported_modes(target.model) is not None
        how = "exported in the client's" if exported else "in the client's (model.train() or eval(), --training)"
        findings.append(
            f"the client was in {client} mode: {' and '.join(changing)} may have changed its gradient; the target is "
            f"in {target.mode} mode, make it of a model {how}"
        )
    elif target.mode == "training" and _DROPOUT in changing:
        findings.append("in training mode dropout draws: no gradient that is recomputed agrees with the client's")
    if header.loss not in (None, target.loss.name):
        findings.append(f"the client used the {header.loss} loss, the target has {target.loss.name}")
    if header.batch_size != target.batch_size:
        findings.append(
            f"the client averaged over {header.batch_size} sample(s), the target expects {target.batch_size}; a sum in "
            "place of a mean also shows as a factor"
        )
    return findings


def _values(update: Update) -> list[str]:
    findings = []
    dtype = update.dtype
    if torch.finfo(dtype).bits < 32:
        zeros = sum(int((g == 0).sum()) for g in update.gradients.values())
        count = sum(g.numel() for g in update.gradients.values())
        smallest = torch.finfo(dtype).smallest_normal
        findings.append(
            f"the gradient is in {str(dtype).removeprefix('torch.')}: values are rounded to "
            f"{torch.finfo(dtype).eps:.0e} of their size, and {zeros} of {count} are zero, which may be values below "
            f"{smallest:.0e} that were lost; expect a coarse answer or none"
        )
    return findings


def _scale(target: Target, last: Layer, update: Update) -> list[str]:
    """Whether the last layer's bias gradient is one sample's, times a factor: what it reads tells its right length."""
    loss, bias = target.loss, update.gradients.get(last.bias_name or "")
    if not loss.labels or bias is None or last.bias is None or last.positions != 1 or update.samples(target) > 1:
        return []
    k = bias.double().to(last.weight.device)
    grad = update.gradients[last.weight_name].double().to(k).reshape(len(k), -1)
    if last.groups != 1 or not k.any() or grad.numel() != last.weight.numel():
        return []
    z = last.weight.reshape(grad.shape) @ (grad.mT @ k / (k @ k)) + last.bias.reshape(-1)
    labels = torch.tensor(loss.labels).to(k)
    given = loss.output_gradient(z.expand(len(labels), -1), labels)
    along = given @ k / (given.norm(dim=1) * k.norm()).clamp(min=torch.finfo(k.dtype).tiny)
    # Of a direction that is none of a sample's no length is told, and of a saturated loss rounding alone.
    fits = (along.abs() > 1 - 1e-6) & (given.norm(dim=1) > 1e-3)
    factors = (k.norm() / given.norm(dim=1) * along.sign())[fits]
    # With two classes, or one output, all labels give the same direction: one that explains the length is enough.
    if not len(factors) or bool((factors - 1).abs().min() < 1e-2):
        return []
    factor = float(factors.max())
    return [
        f"the gradient is {factor:.4g} times that of one sample with the features that {last.name} reads: a loss "
        "scale, a sum in place of a mean, momentum, or a difference taken the other way round"
    ]


def _rank(target: Target, update: Update) -> list[str]:
    """Which Linear layers' gradients are no outer product, as that of one sample is."""
    if update.samples(target) > 1:
        return []
    names = [use.weight_name for use in target.graph.uses]
    found = []
    for use in target.graph.uses:
        name = use.weight_name or ""
        gradient = update.gradients.get(name)
        if gradient is None or names.count(name) > 1 or gradient.shape[:1] != (use.outputs,) or gradient.dim() != 2:
            continue  # read at several positions
        left = leading_pair(gradient.double())[-1] if gradient.any() else 0.0
        if left > RANK * update.precisions[name]:
            found.append(f"{name} ({left:.0e})")
    if not found:
        return []
    return [
        f"the gradient of {', '.join(found)} is not of rank one, as that of one sample is; in brackets how much is "
        "left over: it is of several samples or local steps, or noise, weight decay or compression changed it"
    ]


def batch_size_misfit(target: Target, update: Update) -> str | None:
    """What the ranks of the Linear layers' gradients say against the number of samples, in a sentence; None if nothing
    does. Several local steps are left alone."""
    told = update.samples(target)
    if len(update.header.protocol.minibatches(update.samples_of_one(target))) > 1:
        return None
    try:
        network = target.network
    except NotImplementedError:
        return None
    gradients = {name: g.double().to(network.device) for name, g in update.gradients.items()}
    found = [each for each in ranks(network, target.loss, gradients, update.precision) if each[2] >= each[1]]
    name, rank, _ = max((each for each in found if each[2] >= told or each[1] > told), key=_by_rank, default=("", 0, 0))
    if rank > told:
        return (
            f"The update says that it is of {told} sample{'s' * (told > 1)}, but the gradient of {name} has rank "
            f"{rank}: it is of so many samples or more."
        )
    if 0 < rank < told:
        return (
            f"The update says that it is of {told} samples, but the gradient of {name} has rank {rank}: it is of "
            f"fewer, or {told - rank} of them give no gradient, are the same as others or combine them."
        )
    return None


def _by_rank(found: tuple[str, int, int]) -> int:
    return found[1]


def _products(layers: Sequence[Layer], update: Update) -> tuple[tuple[tuple[str, float], ...], list[float]]:
    """The product of Eq. 10 by layer, and how far rounding may move each."""
    products: list[tuple[str, float]] = []
    noise: list[float] = []
    biases, biases_noise = 0.0, 0.0
    for layer in reversed(layers):
        if layer.bias is not None and layer.bias_name is not None:
            value, rounding = _product(layer.bias, update.gradients[layer.bias_name])
            biases, biases_noise = biases + value, biases_noise + rounding
        value, rounding = _product(layer.weight, update.gradients[layer.weight_name])
        products.insert(0, (layer.name, value + biases))
        noise.insert(0, rounding + biases_noise)
    return tuple(products), noise


def _product(parameter: Tensor, gradient: Tensor) -> tuple[float, float]:
    values, slopes = parameter.reshape(-1), gradient.double().reshape(-1).to(parameter.device)
    return float(values @ slopes), float(values.norm() * slopes.norm()) * torch.finfo(gradient.dtype).eps


def _equal_products(products: tuple[tuple[str, float], ...], noise: list[float]) -> list[str]:
    """Which layers disagree with the others (Eq. 10)."""
    values = sorted(value for _, value in products)
    # The lower median: a value that one of the layers really has.
    agreed = values[(len(values) - 1) // 2]
    allowed = [100 * (own + max(noise)) + 1e-3 * abs(agreed) for own in noise]
    wrong = [
        (name, value)
        for (name, value), bound in zip(products, allowed, strict=True)
        if not math.isclose(value, agreed, rel_tol=0, abs_tol=bound)
    ]
    if not wrong:
        return []
    named = ", ".join(f"{name} ({value:.3g})" for name, value in wrong)
    if len(products) == 2:
        both = " and ".join(f"{name} ({value:.3g})" for name, value in products)
        return [
            f"<W, grad W> differs between {both}: the gradient was probably taken at other weights, or one of the two "
            "layers was changed on its own"
        ]
    if len(wrong) > max(1, len(products) // 2 - 1):
        return [
            f"<W, grad W> differs from layer to layer ({named}; the middle value is {agreed:.3g}): the gradient was "
            "probably taken at other weights, such as a later checkpoint or after a local step, or noise was added"
        ]
    return [
        f"<W, grad W> of {named} does not fit the other layers ({agreed:.3g}): this layer's weights or gradient were "
        "probably changed on their own, by fine-tuning, freezing, clipping, pruning or noise"
    ]


def _last_layer(target: Target, update: Update, product: float, noise: float) -> list[str]:
    """Whether the last layer's product, and its bias if it has one, are possible for the loss."""
    last, loss = target.network.layers[-1], target.margin_loss
    if last.bias_name is None:
        lowest = loss.lowest_product
        if product < lowest - max(100 * noise, 1e-3 * abs(lowest)):
            return [
                f"<W, grad W> of {last.name} is {product:.4g}, below {lowest:.4g}, the least that the {loss.name} loss "
                "can give: the gradient is scaled up (a sum over several samples, a loss scale, a learning rate) or "
                "belongs to another loss"
            ]
        return []
    slope = -abs(float(update.gradients[last.bias_name].double().sum()))
    if slope == 0:
        return []
    # A saturated slope tells no margin: ask whether it is the one of the margin that the product tells.
    if math.isclose(slope, float(loss.slope(torch.tensor(product / slope, dtype=torch.float64))), rel_tol=1e-3):
        return []
    margin = loss.margin(slope)
    if margin is None:
        if loss.margin(-0.5) is None and math.isclose(slope, -1.0, rel_tol=1e-3):
            return []
        return [
            f"the gradient of {last.bias_name} is {abs(slope):.4g}, which no single sample gives under the {loss.name} "
            "loss: it is scaled (a sum, a mean over several samples, a learning rate) or belongs to another loss"
        ]
    # <b, grad b> belongs to the margin as well: mu * dl/dmu counts the whole output.
    found = product / slope
    if not math.isclose(found, margin, rel_tol=1e-2, abs_tol=1e-3 + 100 * noise / abs(slope)):
        return [
            f"the weight and bias gradients of {last.name} tell two margins, {found:.4g} and {margin:.4g}: the "
            "gradient is scaled (a sum, a mean over several samples, a learning rate), or belongs to other weights "
            "or another loss"
        ]
    return []
