"""A random search for samples of batches that are certified and are none: small networks, gradients clean and spoilt.

`python -m tests.attacks.test_no_false_batch FIRST COUNT [few]` searches on, and counts how many batches are told apart
of those whose number of samples the largest batch allows. With `few` each network's gradient is attacked clean and
spoilt in one way, in turn.
"""

from __future__ import annotations

import math
import sys
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, Update, capture, losses
from rgap.attacks import Closed, Reconstruction, Status
from rgap.inversion.subspace.head import largest_batch
from tests.nn.modules import Skip

ACTIVATIONS = [nn.Sigmoid, nn.Tanh, nn.ReLU, lambda: nn.LeakyReLU(0.2), nn.ELU, nn.Softplus, nn.GELU, nn.SiLU]
SPOILT = ("clean", "half", "noise", "one layer scaled", "another batch's layer", "another number of samples")
OTHERWISE = "clean: foretold True, told apart False"
FALSE = 10.0
"""An error above so many times the stated one, and above 1e-3, makes a certificate false."""


def drawn(seed: int) -> tuple[Target, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def one(*of: int) -> int:
        return of[int(torch.randint(len(of), (), generator=generator))]

    activation, bias, classes = ACTIVATIONS[one(*range(8))], bool(one(0, 1, 1)), one(1, 2, 5, 10, 20)
    size, layers = (3, one(4, 6), 4), []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if one(0, 0, 1):
            channels = one(6, 12)
            layers = [nn.Conv2d(3, channels, 3, one(1, 2), 1, bias=bias), activation()]
            if one(0, 0, 1):
                layers.append(Skip(nn.Conv2d(channels, channels, 3, 1, 1, bias=bias), act=activation()))
        layers.append(nn.Flatten())
        width = nn.Sequential(*layers)(torch.zeros(1, *size)).shape[1]
        for wide in [one(12, 24, 40) for _ in range(one(0, 1, 2, 2, 3))]:
            layers += [nn.Linear(width, wide, bias=bias), activation()]
            width = wide
        layers.append(nn.Linear(width, classes, bias=bias))
    model, gain = nn.Sequential(*layers), one(1, 1, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(gain)
    loss: losses.Loss = losses.Logistic() if classes == 1 else losses.CrossEntropy(classes)
    samples = one(2, 3, 4, 6, 9)
    x = torch.rand(samples, *size, generator=generator)
    labels = torch.randint(max(2, classes), (samples,), generator=generator).float()
    target = Target(model, loss, size, (0.0, 1.0), batch_size=samples)
    return target, x, 2 * labels - 1 if classes == 1 else labels


def spoilt(target: Target, x: Tensor, labels: Tensor, how: str) -> Update:
    update = capture(target, x, labels)
    gradients, header = dict(update.gradients), update.header
    generator = torch.Generator().manual_seed(0)
    name = next(iter(gradients))
    if how == "half":
        gradients = {n: g.half().float() for n, g in gradients.items()}
    elif how == "noise":
        gradients = {n: g + 1e-4 * g.norm() * torch.randn(g.shape, generator=generator) for n, g in gradients.items()}
    elif how == "one layer scaled":
        gradients[name] = 1.001 * gradients[name]
    elif how == "another batch's layer":
        gradients[name] = capture(target, another(x), labels).gradients[name]
    elif how == "another number of samples":
        header = type(header)(len(x) - 1 if len(x) > 2 else 3, header.loss)
    return Update(gradients, header)


def another(x: Tensor) -> Tensor:
    """Batch of the same kind."""
    return x.flip(0, -1) ** 2


def false_certificates(found: Reconstruction, x: Tensor) -> int:
    """Samples that are certified and are none of the batch."""
    if not found.answers:
        return 0
    apart = torch.cdist(found.inputs.flatten(1), x.double().flatten(1)).min(1).values / math.sqrt(x[0].numel())
    certified = zip(apart.tolist(), found.samples, strict=True) if found.samples else []
    return sum(sample.status is Status.EXACT and error > max(1e-3, FALSE * sample.error) for error, sample in certified)


def look(seed: int, kinds: tuple[str, ...] = SPOILT) -> Counter[str]:
    target, x, labels = drawn(seed)
    counted: Counter[str] = Counter()
    for how in kinds:
        update = spoilt(target, x, labels, how)
        found = Closed()(target, update)
        # Of a network with a single parameter another batch's layer is another batch's gradient.
        whole = how == "another batch's layer" and len(update.gradients) == 1
        wrong = false_certificates(found, another(x) if whole else x)
        assert not wrong, f"seed {seed}, {how}: {wrong} samples are certified and are none; {found}"
        counted[f"{how}: {found.status.value}"] += 1
        if how == "clean":
            foretold = largest_batch(target.network, target.loss) >= len(x)
            told = found.features is not None and len(found.features.labels) == len(x)
            counted[f"clean: foretold {foretold}, told apart {told}"] += 1
    return counted


@pytest.mark.search
@pytest.mark.parametrize("how", SPOILT)
def test_no_sample_is_certified_that_is_none(how: str, first_seed: int) -> None:
    look(100 * first_seed + SPOILT.index(how) + 2, (how,))


def test_an_error_that_all_samples_share_is_stated() -> None:
    """Of six samples, two classes and rounding to half precision: their cotangents move with them."""
    look(7054, ("half",))


def test_gradients_that_agree_certify_nothing_where_a_layer_is_open() -> None:
    """A convolution's 144 weight rows and 162 gradient rows, 36 of which repeat, leave 18 of 288 dimensions free."""
    counted = look(7057, ("clean",))
    assert counted["clean: rank-deficient"] == 1


def test_many_values_tell_a_batch_whichever_input_of_silu_each_of_them_has() -> None:
    """Behind a convolution and a block 192 values of each sample, four times as many as it has."""
    counted = look(7505, ("clean",))
    assert counted["clean: exact"] == 1


if __name__ == "__main__":
    total: Counter[str] = Counter()
    first, count, few = int(sys.argv[1]), int(sys.argv[2]), "few" in sys.argv[3:]
    for number in range(first, first + count):
        kinds = ("clean", SPOILT[1 + number % (len(SPOILT) - 1)]) if few else SPOILT
        try:
            counted = look(number, kinds)
        except AssertionError as error:
            counted = Counter(["FALSE"])
            print(error)
        if counted[OTHERWISE]:
            print(f"seed {number}: not told apart though foretold")
        total += counted
    print(*sorted(total.items()), sep="\n")
