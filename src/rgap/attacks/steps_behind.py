"""One epoch of local steps through layers with Linear ones behind: features of every sample, and inputs where they are
told."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.attacks.progress import Reporter
from rgap.attacks.result import BatchFeatures, Outcome, Status
from rgap.attacks.verdict import EXPLAINED
from rgap.inversion.all_steps import AllSteps
from rgap.inversion.front_steps import MOST, inputs_by_steps, passable
from rgap.inversion.head_steps import HeadClient
from rgap.inversion.local_steps import CAREFUL, Recovered, recover
from rgap.inversion.subspace.peel import Search
from rgap.inversion.unrolled import drawn_moves
from rgap.inversion.walk import Client, Difference, Plan
from rgap.linalg.deadline import OutOfTime
from rgap.target import Target

DRAWS = 3
"""Of the features' errors."""
ORDER = "samples come in the order of the steps, and within a minibatch in the order in which they were found"


def steps_behind_front(
    target: Target, client: Client, plan: Plan, difference: Difference, search: Search
) -> Recovered | Outcome | None:
    """The samples of all steps; what the Linear layers behind read of them, where no more is told; None where these do
    not tell samples apart, or there are several epochs, between which features move."""
    if plan.steps != plan.epoch or plan.steps == 1 or plan.clip_norm is not None:
        return None
    head = HeadClient.of(client, difference.sent)
    if head is None:
        return None
    sent = {name: difference.sent[name] for name in head.client.weights}
    noise = {name: difference.noise[name] for name in sent}
    own = Difference(sent, noise, difference.eps, difference.own)
    report = Reporter("Closed, features", plan.samples)
    found = recover(head.client, lambda _: plan, plan.samples, lambda _: own, search, report)
    layer = target.network.nodes[head.value_id].op.name
    if found.stop is not None:
        bound = replace(found.stop, text=f"from {layer} on: {found.stop}")
        return Outcome(Status.NOT_CONVERGED, str(bound), bound=bound)
    if not found.misfit <= EXPLAINED or len(found.x) != plan.samples:
        return None
    moved = _moved_by_rounding(head.client, plan, own, found)
    features = BatchFeatures(layer, found.x, found.labels)
    why = passable(target.network.up_to(head.value_id), plan.steps)
    if why is None:
        try:
            steps = Reporter("Closed, layers in front, step", MOST)
            inputs = inputs_by_steps(client, plan, difference, head, found, moved, steps)
        except OutOfTime:
            why = "the time was up"
        else:
            if inputs is not None and inputs.misfit <= EXPLAINED:
                return inputs
            why = "the layers in front do not tell what they read"
            if inputs is not None:
                why = f"the nearest that were found miss the difference by {inputs.misfit:.1f} roundings"
    reason = (
        f"the labels of all {len(found.x)} samples, the step of each and what {layer} reads of it, but no inputs: {why}"
    )
    return Outcome(Status.PARTIAL, reason, (), (ORDER,), features, found.order)


def _moved_by_rounding(client: Client, plan: Plan, difference: Difference, found: Recovered) -> Float[Tensor, "d n u"]:
    """By how much rounding may have moved features: some draws of it through all steps together, which is mostly along
    each other; where that cannot be had independent errors, by each step's row space."""
    x, layer = found.x.flatten(1), client.network(client.weights).layers[0]
    steps = AllSteps(client, plan, difference, layer, found.labels)
    moved = drawn_moves(steps, x, found.order, DRAWS)
    if moved is not None:
        return CAREFUL * max(1.0, found.misfit) * moved
    generator = torch.Generator(device=x.device).manual_seed(0)
    drawn = torch.randn(DRAWS, *x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return found.error[:, None] * drawn
