"""Models of words: which tokens a batch held, from the rows of the embedding that have a gradient."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def tokens(model: nn.Module, gradients: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The set of tokens that the samples behind a gradient held, for each embedding of a model.

    Only the rows that were looked up have a gradient, so the set is exact, whatever the number of samples; order and
    counts are not told. Of an embedding whose weights are also the output layer's every row has a gradient: all of
    them are given then.

    Args:
        gradients: by parameter name, or an `Update`; weight differences after local steps serve as well.

    Raises:
        ValueError: the model has no embedding whose gradient is there.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"got a {type(model).__name__}, expected the model first, then its gradients by name")
    gradients = getattr(gradients, "gradients", gradients)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            gradient = gradients.get(f"{name}.weight".removeprefix("."))
            if gradient is not None:
                rows = (gradient.to_dense() if gradient.is_sparse else gradient).flatten(1).abs().amax(1)
                found[name] = tuple(int(row) for row in rows.nonzero().flatten())
    if not found:
        raise ValueError("the model has no nn.Embedding or nn.EmbeddingBag whose gradient is there: no tokens to tell")
    return found
