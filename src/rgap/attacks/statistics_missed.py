"""Whether inputs have the statistics of batch norms that were sent: what the gradient does not show of them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rgap.nn.batch_norm import BatchNorm
from rgap.target import Target


def statistics_missed(target: Target, inputs: Float[Tensor, "b ..."], error: float) -> float:
    """By how many times what rounding explains the mean and variance of what batch norms in training mode read miss
    those that running statistics tell; the worst norm counts, 0 where nothing is told.

    Args:
        target: as `Target.of_batch` gives it, for the whole batch.
        error: of the inputs, root mean square.
    """
    try:
        told = target.network
    except NotImplementedError:
        return 0.0
    ops = [node.op for node in told.nodes]
    norms = [at for at, op in enumerate(ops) if isinstance(op, BatchNorm) and op.samples == len(inputs)]
    values = told.own.forward(inputs.double()) if norms else []
    size = float(inputs.double().square().mean().sqrt()) or 1.0
    worst = 0.0
    for at in norms:
        norm, z = told.nodes[at].op, values[told.nodes[at].reads[0]]
        assert isinstance(norm, BatchNorm)
        missed = (norm.forward(z) - values[at + 1]) / norm.gamma
        explained = norm.precision + error / size
        worst = max(worst, float(missed.square().mean().sqrt()) / explained)
    return worst
