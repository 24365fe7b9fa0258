"""Which tokens a gradient tells, and what is said of models that take them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap import Target, losses


class Mean(nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, 6, sparse=sparse), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids).mean(1))


class Two(nn.Module):
    """Words and places."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(50, 6), nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head((self.words(ids) + self.places(torch.arange(ids.shape[1]))).mean(1))


def bag() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(50, 6), nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("make", "name"), [(Mean, "words"), (lambda: Mean(sparse=True), "words"), (Two, "words"), (bag, "0")]
)
@pytest.mark.parametrize("samples", [1, 4])
def test_the_set_of_tokens_is_exact(make: Callable[[], nn.Module], name: str, samples: int) -> None:
    model = make()
    ids = torch.randint(50, (samples, 5), generator=torch.Generator().manual_seed(samples))
    nn.functional.cross_entropy(model(ids), torch.arange(samples) % 3).backward()
    told = rgap.tokens(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert told[name] == tuple(sorted(set(ids.flatten().tolist())))
    assert told.get("places", tuple(range(5))) == tuple(range(5))


@pytest.mark.parametrize("make", [Mean, Two, bag])
@pytest.mark.parametrize("loss", [losses.CrossEntropy(3), "cross-entropy", None])
def test_a_model_of_words_gets_a_straight_answer(make: Callable[[], nn.Module], loss: object) -> None:
    with pytest.raises(ValueError, match=r"takes whole numbers.*rows of the embedding have a gradient; rgap.tokens"):
        Target(make(), loss, (5,))  # type: ignore[arg-type]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.f(left - right)


@pytest.mark.parametrize("loss", ["cross-entropy", "mse", None])
def test_a_model_of_several_inputs_is_told_what_to_give(loss: str | None) -> None:
    with pytest.raises(ValueError, match=r"'right'. Of several inputs one is attacked: give each by its name"):
        Target(Pair(), loss, (4,))  # type: ignore[arg-type]


def test_without_an_embedding_there_are_no_tokens() -> None:
    with pytest.raises(ValueError, match="has no nn"):
        rgap.tokens(nn.Linear(2, 2), {"weight": torch.ones(2, 2)})
