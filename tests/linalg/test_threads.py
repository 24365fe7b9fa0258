"""One thread inside, as many as before outside, whatever happens."""

import pytest
import torch

from rgap.linalg.threads import one_thread

pytestmark = pytest.mark.usefixtures("two_threads")


def test_one_thread_inside_and_as_many_as_before_outside() -> None:
    with one_thread(), one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_an_error_leaves_the_threads_as_they_were() -> None:
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert torch.get_num_threads() == 2
