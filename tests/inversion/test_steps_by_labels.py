"""A start for the samples of several steps where mixtures fit as well."""

from __future__ import annotations

import torch
from torch import nn

from rgap import Protocol, Target, capture, losses
from rgap.attacks.local_steps import client_of, plan_of
from rgap.inversion.local_steps import recover
from rgap.inversion.steps_by_labels import begun_by_labels
from rgap.inversion.subspace.peel import Search
from rgap.inversion.subspace.span import Span
from rgap.inversion.subspace.step import Place
from rgap.inversion.walk import Difference, Plan, Walk
from rgap.protocol import Sends

LABELS = torch.tensor([3.0, 0.0, 1.0, 5.0])
ORDER = [{0, 1}, {2, 3}]


def straight() -> tuple[Place, Plan, Walk, Difference, torch.Tensor]:
    """Four samples that are nearly the same, in steps of two: no unit bends between them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 24), nn.LeakyReLU(0.2), nn.Linear(24, 6)).double()
    x = 0.5 + 0.02 * torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = Target(model, losses.CrossEntropy(6), (30,), (0.0, 1.0), batch_size=4)
    protocol = Protocol(Sends.DIFFERENCE, learning_rate=0.1, epochs=1, minibatch=2, shuffled=False)
    sent = capture(target, x, LABELS.double(), protocol).gradients
    client, plan = client_of(target), plan_of(protocol, 4)
    difference = Difference.of(sent, client.weights, 1e-9, 1e-9, plan.steps)
    walk = Walk(client, plan)
    c = abs(plan.expansion[-1][1][0])
    noise = {name: each / c for name, each in difference.noise.items()}
    left = walk.left(sent)
    grad = torch.cat([left["0.weight"], left["0.bias"][:, None]], 1)
    u, sizes, vt = torch.linalg.svd(grad, full_matrices=False)
    network = client.network(client.weights)
    layer = network.layers[0]
    first = Span(layer, u[:, :4], sizes[:4].diag(), vt[:4].mT, 4, 1e-9, True)
    return Place.of(network, client.loss, left, noise, first, 4), plan, walk, difference, x


def test_labels_are_counted_and_samples_are_near() -> None:
    place, plan, walk, difference, x = straight()
    begun = begun_by_labels(place, plan, walk.left(difference.sent))
    assert begun is not None
    found, order = begun
    assert sorted(found.labels.tolist()) == sorted(LABELS.tolist())
    assert [len(members) for members in order] == [2, 2]
    of = [LABELS.tolist().index(label) for label in found.labels.tolist()]
    off = (found.x - x[of]).norm(dim=1) / (x - x.mean(0)).norm(dim=1).mean()
    assert float(off.max()) < 1  # nearer than another sample is


def test_all_samples_and_their_steps_come_back_from_there() -> None:
    _, plan, walk, difference, x = straight()
    search = Search(starts=2, rounds=0, max_steps=1)  # so little that no sample is found step by step
    found = recover(walk.client, lambda _: plan, 4, lambda _: difference, search, lambda *_: None)
    assert found.stop is None
    assert found.misfit < 3
    assert found.certain
    of = [LABELS.tolist().index(label) for label in found.labels.tolist()]
    assert [{of[each] for each in members} for members in found.order] == ORDER
    assert float((found.x - x[of]).abs().max()) < 1e-4
