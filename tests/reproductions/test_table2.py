"""Table 2: the networks have the indices that the paper prints, and the table says what its rows say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from rgap import Target, losses, rank_analysis
from rgap.reproductions.architectures import INPUT_SHAPE, NETWORKS
from rgap.reproductions.table2 import PAPER, Table2
from rgap.store import Row


@pytest.mark.parametrize(("build", "index"), NETWORKS)
def test_each_network_counts_to_the_printed_index(build: Callable[[int], nn.Module], index: int) -> None:
    target = Target(build(0), losses.Logistic(), INPUT_SHAPE)
    assert rank_analysis(target, measure=False).index == index


def test_each_network_has_a_printed_error() -> None:
    assert list(PAPER) == [build.__name__ for build, _ in NETWORKS]


def test_means_worst_and_statuses_are_those_of_a_networks_own_rows() -> None:
    def picture(recursive: float, closed: float, status: str, free: int | None, seconds: float) -> Row:
        both = {"recursive": recursive, "closed": closed}
        return Row(
            {
                name: {"mse": mse, "status": status, "residual": 0.0, "free": free, "seconds": seconds}
                for name, mse in both.items()
            }
        )

    rank = Row({"index": 405, "free_layers": [414, 0], "free_jointly": 414})
    rows = {
        "deficient_first rank": rank,
        "deficient_first 0": picture(1.0, 0.25, "exact", None, 1.0),
        "deficient_first 1": picture(3.0, 0.75, "rank-deficient", 414, 9.0),
        "deficient_first 10": picture(5.0, 0.5, "rank-deficient", 420, 2.0),
        "deficient_first_wide rank": rank,
        "deficient_first_wide 0": picture(100.0, 100.0, "exact", None, 100.0),
    }
    chosen = tuple(each for each in NETWORKS if each[0].__name__.startswith("deficient_first"))
    found = Table2(networks=chosen).summary(rows)["deficient_first"]
    assert found["recursive"]["mse"] == 3.0
    assert (found["closed"]["mse"], found["closed"]["worst"], found["closed"]["seconds"]) == (0.5, 0.75, 2.0)
    assert found["closed"]["statuses"] == {"exact": 1, "rank-deficient": 2}
    assert found["free_at_answer"] == [414, 420]
    assert (found["index_paper"], found["index"], found["mse_paper"]) == (405, 405, [0.056, 0.063])
