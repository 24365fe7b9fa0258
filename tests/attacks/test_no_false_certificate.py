"""A random search for answers that are called exact and are not; `benchmarks/certificates.py` searches on."""

from __future__ import annotations

import pytest
from benchmark import load

certificates = load("certificates")


@pytest.mark.search
@pytest.mark.parametrize("part", range(3))
def test_no_certificate_is_false(part: int, first_seed: int) -> None:
    seeds = range(100 * first_seed + 2 * part, 100 * first_seed + 2 * part + 2)
    found = [each for seed in seeds for each in certificates.outcomes(seed)]
    assert found
    assert [each for each in found if each.false] == []
