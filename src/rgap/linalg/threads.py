"""On how many threads torch computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """What runs inside this block, or in a function that it decorates, runs on one thread of torch's.

    The operations of an attack are many and small. Several threads do them no faster, and wait for each other by
    spinning: beside one busy process on two cores they take two to four times as long. On one thread the same sums are
    also rounded the same, whatever the machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
