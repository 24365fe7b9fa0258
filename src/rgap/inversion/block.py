"""Back through a block with branches: out = x + F(x), several paths that are concatenated, and the like.

What every value inside is goes from one to the next like a rumour: an inner activation h is known as soon as the
gradient rows K h = grad W of the layers that read it determine it; then z = W h + b is, and so is what else
enters the sum, x = out - z. Where that leads nowhere the block's input is sought from all its constraints at once.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from rgap.inversion.block_solve import BlockInput, solve_jointly
from rgap.inversion.block_values import DENSE, BlockValues
from rgap.inversion.history import Paths
from rgap.inversion.normed import through_both
from rgap.inversion.report import LayerReport
from rgap.inversion.state import Cause, Observation, State, Stop
from rgap.inversion.unpool import FEWER
from rgap.nn.batch_norm import BatchNorm
from rgap.nn.network import Network
from rgap.nn.ops import Norm, Other
from rgap.nn.pools import Pool


def solve_block(network: Network, value_id: int, observed: Observation, paths: Paths, inputs: int) -> Paths | Stop:
    """The block's input from its output, for each candidate by itself; those that get nowhere fall out.

    Args:
        network: the block alone.
        value_id: of its output.
        inputs: numbers of the whole network's input.
    """
    found = []
    for s, history in enumerate(paths.history):
        one = observed.one(int(paths.update[s]))
        found.append(solve_one(network, value_id, one, paths.state.one(s), history.open_since, inputs))
    passed = [s for s, each in enumerate(found) if not isinstance(each, Stop)]
    if not passed:
        return next(each for each in found if isinstance(each, Stop))
    kept = paths.select(torch.tensor(passed, device=paths.root.device))
    through = [each for each in found if not isinstance(each, Stop)]
    histories = [each.passed_block(reports) for each, (_, reports) in zip(kept.history, through, strict=True)]
    return replace(kept, state=State.concatenate([state for state, _ in through]), history=tuple(histories))


def solve_one(
    network: Network,
    value_id: int,
    observed: Observation,
    state: State,
    open_since: str | None,
    inputs: int | None = None,
) -> tuple[State, tuple[LayerReport, ...]] | Stop:
    """For one candidate: what is known of the block's input, and its layers' reports from the input to the output.

    Args:
        state: (b, *shape), of all samples of one update.
        open_since: a layer that leaves the block's output open.
        inputs: numbers of the whole network's input. A large block is not solved jointly where they are far fewer than
            its own: all that is in front can be.
    """
    end = network.nodes[-1].op
    if isinstance(end, (BatchNorm, Norm)):  # and the layer that it reads
        found = through_both(network, observed, state)
        return found if isinstance(found, Stop) else found[:2]
    if open_since is not None:
        what = f"{open_since} leaves its input open, and no branches are followed from there"
        return Stop(end, Cause.OPEN, what)
    lossy = next((node.op for node in network.nodes if isinstance(node.op, (Norm, Other, Pool))), None)
    if lossy is not None:
        return Stop(lossy, Cause.LOSSY, lossy.loses)
    block = BlockValues(network, observed, state, observed.probe(value_id, state.value.device))
    block.propagate()
    large = state.value.numel() > DENSE
    if large and not block.determined and inputs is not None and FEWER * inputs <= math.prod(network.input_shape):
        return Stop(end, Cause.OPEN, "its layers do not tell what they read one after the other")
    if not (large and block.determined) or network.own.coupled:
        # Where one value after another led to the input it used some of the rows and not others; all of them know
        # better. What told statistics say is as precise as these, and all rows do without them.
        start = block.values[0].value if block.determined else block.start()
        solved = solve_jointly(network.own, observed, state, start)
        if isinstance(solved, BlockInput):
            block.take(solved)
        elif not block.determined or block.samples > 1:
            return solved  # of several samples no candidate is compared with others later on
    value = block.values[0]
    reports = tuple(block.reports[node] for node in sorted(block.reports))
    return State(value.value, block.ks[0], None, value.std), reports
