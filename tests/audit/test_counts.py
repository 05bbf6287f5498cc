"""Counts of tensor pairs that come in blocks, of any shape, finite or not."""

import dataclasses

import pytest
import torch

from audit.dense import F32, PAIRS, changed_mask, common_of, entrywise, pair
from offprincipal_peft.audit.counts import Counts, squared_norm
from offprincipal_peft.audit.patterns import Patterns
from offprincipal_peft.audit.results import Entrywise


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("bad", [False, True])
def test_counts_of_blocks(dtypes: tuple[torch.dtype, torch.dtype], bad: bool) -> None:
    base, tuned = pair((30, 40), dtypes)
    if bad:
        tuned[2, 3], base[9, 9], base[0, 0], tuned[0, 0] = torch.nan, torch.inf, torch.nan, torch.nan
    expected = entrywise(base, tuned, common=common_of(base, tuned), wanted=())
    counts, patterns = Counts(common_of(base, tuned)), Patterns((3, 10, 40), 2)
    for start in range(0, 1200, 500):
        block = slice(start, start + 500)
        counts.add(base.view(-1)[block], tuned.view(-1)[block], patterns=patterns, index=1, start=start)
    found = counts.result()
    assert dataclasses.replace(found, norm=expected.norm) == expected
    assert found.norm == pytest.approx(expected.norm, rel=1e-12)
    assert torch.equal((patterns.codes == 2).view(30, 40), changed_mask(base, tuned))


def test_counts_of_a_scalar_and_of_nothing() -> None:
    counts = Counts(F32)
    counts.add(torch.tensor(1.0), torch.tensor(3.0))
    counts.add(torch.zeros(0), torch.zeros(0))
    assert counts.result() == Entrywise(1, 1, 2.0, 2.0)
    with pytest.raises(ValueError, match=r"shape \(3,\) on cpu and the tuned tensor \(4,\)"):
        counts.add(torch.zeros(3), torch.zeros(4))


def test_squared_norm_is_of_the_finite_entries() -> None:
    weight = torch.tensor([3.0, -4.0, torch.nan, torch.inf, -torch.inf])
    assert squared_norm(weight) == 25.0 and squared_norm(weight[:2].bfloat16()) == 25.0
    assert squared_norm(torch.zeros(0)) == 0.0
