"""What the whole folder shares: a collector that does not walk the imported libraries again and again."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def only_new_objects_are_collected() -> Iterator[None]:
    """Every trainer collects garbage before it trains, which took four fifths of such a short run's time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
