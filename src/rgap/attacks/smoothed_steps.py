"""One sample behind local steps through a chain of layers with kinks, of as many values as memory and time allow."""

from __future__ import annotations

import math

from rgap.attacks.progress import Reporter
from rgap.attacks.verdict import EXPLAINED
from rgap.inversion.local_steps import UNEXPLAINED, Recovered
from rgap.inversion.output import OutputCandidates
from rgap.inversion.prior import Prior
from rgap.inversion.smoother.setting import Setting, memory, operations, operations_to_the_end
from rgap.inversion.smoother.smooth import Reached, mismatch, smooth
from rgap.inversion.smoother.steps import KinkedSteps, is_kinked_chain
from rgap.inversion.step_bounds import Bound, Limit
from rgap.inversion.walk import Client, Difference, Plan
from rgap.linalg import deadline
from rgap.target import Target

MEMORY = 4 * 2**30
"""Bytes that may be taken."""
SPEED = 5e10
"""Operations a second, on one thread."""
PASSES = 2
"""Below the time of so many passes nothing is begun."""
ALIKE = 2.0
"""A label under which the last layers fit worse by this factor than under the best one is not tried."""


def smoothed(
    target: Target, output: OutputCandidates, client: Client, plan: Plan, difference: Difference
) -> Recovered | None:
    """The sample of all steps, or the nearest that was found; None where the network is another one, or nothing was.

    Its label is one of those that the last layer's gradient allows, the one first with which the layers in front of it
    agree best.

    Raises:
        OutOfTime: the time was up before there was anything.
    """
    network = target.network
    if plan.clip_norm is not None or not is_kinked_chain(network, list(difference.sent)):
        return None
    stop = _too_large(target, plan.steps)
    nothing = output.labels.new_zeros(0)
    if stop is not None:
        return Recovered(nothing, nothing, nothing, (), samples=1, stop=stop)
    value_range = target.value_range or (-1.0, 1.0)
    shape = target.input_shape
    # Each channel by itself: a colour prior decides too much while the rows decide little.
    prior = Prior((1, *shape[1:]) if len(shape) == 3 else shape, sum(value_range) / 2)
    tried = []
    for at in range(len(output.labels)):
        label = output.labels[at : at + 1].double()
        setting = Setting(KinkedSteps(client, plan, difference, label), prior, value_range)
        k = output.k[at].reshape(1, *network.shapes[-1])
        tried.append((mismatch(setting, k) if len(output.labels) > 1 else 0.0, setting, k))
    tried.sort(key=lambda each: each[0])
    best: tuple[Reached, Setting] | None = None
    for missed, setting, k in tried:
        if missed > ALIKE * tried[0][0] or (best is not None and best[0].misfit <= EXPLAINED):
            break
        report = Reporter("Closed, all steps together, pass", setting.smoothing.most)
        found = smooth(setting, k, UNEXPLAINED, report)
        if found is not None and (best is None or found.misfit < best[0].misfit):
            best = found, setting
    if best is None:
        deadline.check()
        return None
    return _recovered(*best)


def _recovered(found: Reached, setting: Setting) -> Recovered:
    steps = setting.steps
    order, agrees = ((0,),) * steps.plan.steps, found.misfit <= EXPLAINED
    return Recovered(
        found.x,
        steps.labels,
        steps.labels.new_full((1,), found.error),
        order,
        found.misfit,
        steps.difference.missed(found.walk),
        True,
        1,
        nearest=not agrees,
        cut_off=found.cut_off,
        assumption=str(setting.prior),
    )


def _too_large(target: Target, steps: int) -> Bound | None:
    """Why passes are not begun."""
    network, values = target.network, math.prod(target.input_shape)
    needed, left = memory(network), deadline.share(1.0)
    if needed > MEMORY:
        text = (
            f"the steps on {values} values together take about {needed / 2**30:.0f} GiB, {MEMORY / 2**30:.0f} are "
            "taken: smaller inputs would be read"
        )
        return Bound(Limit.SIZES, text)
    seconds, whole = PASSES * operations(network) / SPEED, operations_to_the_end(network, steps) / SPEED
    if left is not None and left < seconds:
        text = (
            f"the steps on {values} values together take {seconds:.0f} s at the least and about {whole:.0f} s, "
            f"{left:.0f} are left: a larger budget would let them be read"
        )
        return Bound(Limit.TIME, text)
    return None
