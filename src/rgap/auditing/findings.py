"""What makes an audit mean something else than its reader thinks: told before any result."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rgap.auditing.local_steps import obstacles, sent_buffers
from rgap.auditing.observed import Observed
from rgap.checks import batch_size_misfit, changes_with_mode, range_misfit
from rgap.losses import MeanSquaredError
from rgap.nn.models import exported_modes
from rgap.target import Target

LOSSES = {
    "sigmoid": "BCELoss (--loss bce)",
    "softmax": "NLLLoss of its logarithm",
    "log_softmax": "NLLLoss (--loss nll)",
}
"""What a client usually takes of a model that ends in such a function."""


LARGE = 10.0
"""Inputs above it are not scaled as people scale them."""
MOST = 12
"""Sentences: clients whose updates differ a little need not all be told of."""


def findings(target: Target, observed: Sequence[Observed]) -> tuple[str, ...]:
    """One sentence for each."""
    found = []
    ending = target.graph.ending
    if ending and not target.graph.ending_is_the_loss:
        found.append(
            f"The model ends in {ending}, and the {target.loss.name} loss takes what comes out of it. A client whose "
            f"loss is {LOSSES[ending]} sends another gradient: then what stands here is of another client."
        )
    if target.graph.returned > 1:
        found.append(
            f"The model returns {target.graph.returned} values, and the loss was taken of one alone, the first or that "
            "called logits or out. What a client adds for the others is not in the gradient that was audited."
        )
    if target.loss.aid:
        found.append(f"An aid that no attacker has: {target.loss.aid}.")
    known = [each.truth for each in observed if each.truth is not None]
    outside = range_misfit(target, known) if known else None
    if outside is not None:
        found.append(outside)
    found += [each for each in (_unscaled(observed), _own_target(target)) if each]
    for each in observed:
        found += obstacles(target, each.update)
        buffers = sent_buffers(target, each.update)
        contradicted = batch_size_misfit(target, each.update)
        found += [said for said in (buffers, contradicted) if said]
    return tuple(dict.fromkeys(found))[:MOST]


def _unscaled(observed: Sequence[Observed]) -> str:
    """What large inputs did to the loss; empty if nothing."""
    zero = [each.truth for each in observed if each.truth is not None and each.update.norm == 0]
    largest = max((float(x.abs().max()) for x in zero), default=0.0)
    if largest <= LARGE:
        return ""
    return (
        f"{len(zero)} of {len(observed)} gradients are zero: inputs of size {largest:.3g} saturate the loss. A client "
        "that trains scales them first; say how (--mean and --std, a number for each column), or scale the data."
    )


def _own_target(target: Target) -> str:
    """Of a model that may be meant to give back its input."""
    values = math.prod(target.input_shape)
    if not isinstance(target.loss, MeanSquaredError) or values < 2 or target.loss.outputs != values:
        return ""
    return (
        f"The model has as many outputs as inputs, {values}, and the loss compares them with a class. A client that "
        "trains it to give back its input, as an autoencoder, sends another gradient: then what stands here is of "
        "another client. For that one let the model return its error, ((f(x) - x) ** 2).flatten(1).mean(1, "
        "keepdim=True), and the loss be a function of outputs and targets that returns outputs.mean() "
        "(--loss PKG.MOD:LOSS)."
    )


def mode(target: Target) -> str:
    """The mode that was audited, and what would be another in the other one, of a model that has two."""
    names = " and ".join(changes_with_mode(target.model))
    if target.mode == "training":
        return f"The model was audited in training mode: {names} as a client has it while it trains."
    exported = exported_modes(target.model) is not None
    how = "export it in training mode" if exported else "--training, or model.train() before the target is made"
    return (
        f"The model was audited in evaluation mode. A client that trains has {names} in training mode, which gives "
        f"another gradient, and another result: {how}."
    )
