"""The list of what stands in the way of a plain chain."""

from __future__ import annotations

from rgap.nn.obstacles import FOLLOWED, KNOWN, Kind, NotAChain, Obstacle, about, known


def test_the_message_lists_every_obstacle() -> None:
    obstacles = [
        Obstacle("features.3", "max_pool2d", Kind.NOT_YET, "Replace it."),
        Obstacle("head", "softmax", Kind.SETTING, "Remove it."),
        Obstacle("forward", "sign", Kind.NEVER, "Nothing to be done."),
    ]
    error = NotAChain(obstacles)
    assert isinstance(error, ValueError)
    assert error.obstacles == tuple(obstacles)
    assert str(error).splitlines() == [
        "the model is no plain chain of layers, 3 obstacle(s):",
        "  - features.3: max_pool2d (not supported yet). Replace it.",
        "  - head: softmax (wrong setting). Remove it.",
        "  - forward: sign (never invertible). Nothing to be done.",
    ]


def test_every_operation_has_a_kind_and_a_remedy() -> None:
    assert set(KNOWN) > FOLLOWED
    for operation in KNOWN:
        kind, remedy = about(operation)
        assert known(operation)
        assert remedy
        assert (kind is Kind.PASSED) == (KNOWN[operation][0] is Kind.PASSED)
    assert not known("something_new")
    assert about("something_new")[0] is Kind.NOT_YET
