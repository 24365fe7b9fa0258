"""What running statistics tell of a batch, against the batch itself; and the norm with them, against torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, losses
from rgap.nn.batch_norm import BatchNorm, statistics


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0, None])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d, (5, 3)),
        (nn.BatchNorm2d, (2, 3, 4, 4)),
        (nn.SyncBatchNorm, (3, 3, 2)),
        (nn.BatchNorm3d, (1, 3, 2, 2, 2)),
    ],
)
def test_the_batchs_statistics_follow_from_the_running_ones(
    momentum: float | None, steps: int, norm: type[nn.Module], shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(norm(3, momentum=momentum)).double().train()
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps + 1)]
    for x in draw[:-1]:
        _run(model, x)
    before = state(model)
    _run(model, draw[-1])
    found = statistics(model, before, state(model), shape[0])["0.running_mean"]
    rows = draw[-1].transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.mean, rows.mean(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.variance, rows.var(1), rtol=1e-9, atol=1e-12)


def _run(model: nn.Module, x: Tensor) -> None:
    """SyncBatchNorm runs on accelerators alone: here another norm runs with its buffers."""
    norm = model[0]  # type: ignore[index]
    if isinstance(norm, nn.SyncBatchNorm):
        plain = nn.BatchNorm1d(3, momentum=norm.momentum).double().train()
        plain.load_state_dict(norm.state_dict())
        plain(x)
        norm.load_state_dict(plain.state_dict())
    else:
        model(x)


@pytest.mark.parametrize("how", ["frozen", "not sent", "not kept", "momentum 0"])
def test_statistics_that_did_not_run_tell_nothing(how: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.0 if how == "momentum 0" else 0.1)).train(how != "frozen")
    if how == "not kept":
        model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).train()
    before = state(model)
    model(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    assert statistics(model, before, {} if how == "not sent" else state(model), 4) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_unit_that_is_zero_throughout_hides_no_other(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3)).to(dtype).train()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x[:, 1] = 0
    before = state(model)
    model(x)
    found = statistics(model, before, state(model), 4)["0.running_mean"]
    rounded = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.variance, x.double().var(0), rtol=rounded, atol=0)
    torch.testing.assert_close(found.mean, x.double().mean(0), rtol=rounded, atol=rounded)
    assert found.precision < rounded


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_with_its_statistics_the_norm_is_affine_both_ways(samples: int, own: bool) -> None:
    """Values and cotangents of the whole network are those of torch's own backward pass."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3, momentum=None),
            nn.ELU(), nn.Flatten(), nn.Linear(27, 4),
        ).double().train()  # fmt: skip
        for norm in (model[1], model[4]):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    target = Target(model, losses.CrossEntropy(4), (2, 6, 6), None, samples)
    x = torch.randn(samples, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.arange(samples) % 4
    trained = copy.deepcopy(model)
    trained(x)
    gradients = target.gradient(x, y)
    network = target.of_batch(dict(trained.named_buffers()), gradients, samples).network
    norms = [node.op for node in network.nodes if isinstance(node.op, BatchNorm)]
    assert len(norms) == 2
    assert all(0 < norm.precision < 1e-13 for norm in norms)
    if own:
        network = network.own
        assert network.coupled
    values = network.forward(x)
    torch.testing.assert_close(values[-1], model(x), rtol=1e-8, atol=1e-10)
    k = target.loss.output_gradient(values[-1], y.double()) / samples
    ks = network.cotangents(values, network.slopes(values), k)
    for layer, found in network.gradients(values, ks):
        expected = layer.pack_weight(gradients[layer.weight_name][None])[0]
        torch.testing.assert_close(found.sum(0), expected, rtol=1e-8, atol=1e-10)


def test_without_its_weights_gradient_the_norm_stays_closed() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)).double().train()
    target = Target(model, losses.CrossEntropy(2), (2, 6, 6), None)
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    gradients = target.gradient(x, torch.tensor([0]))
    trained = copy.deepcopy(model)
    trained(x)
    del gradients["1.weight"]
    seen = target.of_batch(dict(trained.named_buffers()), gradients, 1)
    assert not any(isinstance(node.op, BatchNorm) for node in seen.network.nodes)
