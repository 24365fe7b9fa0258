"""Workers stay with their networks, and no job is forgotten or given out twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rgap.sweeps.lanes import Lanes

NETWORKS = st.lists(st.integers(1, 6), min_size=1, max_size=5)
"""How many jobs each of them has."""


def waiting(sizes: list[int]) -> list[tuple[str, str]]:
    return [(f"{network}.{at}", str(network)) for network, size in enumerate(sizes) for at in range(size)]


def network(key: str) -> str:
    return key.split(".")[0]


@given(NETWORKS, st.data())
def test_every_job_is_given_out_once_and_in_the_order_of_its_network(sizes: list[int], data: st.DataObject) -> None:
    lanes, jobs = Lanes(), waiting(sizes)
    lanes.fill(jobs)
    given_out: list[str] = []
    while lanes:
        key = lanes.next(data.draw(st.sampled_from("abc")))
        assert key is not None
        given_out.append(key)
    assert lanes.next("a") is None
    assert sorted(given_out) == sorted(key for key, _ in jobs)
    for at in map(str, range(len(sizes))):
        own = [key for key in given_out if network(key) == at]
        assert own == [key for key, name in jobs if name == at]


@given(NETWORKS, st.data())
def test_a_worker_leaves_a_network_only_when_nothing_of_it_is_left(sizes: list[int], data: st.DataObject) -> None:
    lanes, left = Lanes(), dict(waiting(sizes))
    lanes.fill(waiting(sizes))
    at: dict[str, str] = {}
    while lanes:
        lane = data.draw(st.sampled_from("abc"))
        counts = {name: list(left.values()).count(name) for name in left.values()}
        key = lanes.next(lane)
        assert key is not None
        if lane in at and network(key) != at[lane]:
            assert at[lane] not in counts
        if lane not in at or network(key) != at[lane]:
            others = {name for other, name in at.items() if other != lane}
            alone = [name for name in counts if name not in others and name != at.get(lane)]
            # One that nobody is at, or else the one of which most is left.
            assert network(key) in alone or (not alone and counts[network(key)] == max(counts.values()))
        at[lane] = network(key)
        del left[key]


def test_what_comes_back_is_next() -> None:
    lanes = Lanes()
    lanes.fill(waiting([3, 1]))
    first, second = lanes.next("a"), lanes.next("a")
    assert (first, second) == ("0.0", "0.1")
    lanes.give_back([("0.1", "0"), ("0.0", "0")])
    assert [lanes.next("a") for _ in range(4)] == ["0.0", "0.1", "0.2", "1.0"]
    lanes.give_back([("9.0", "9")])  # of a network of which nothing was left
    assert lanes.next("b") == "9.0"
