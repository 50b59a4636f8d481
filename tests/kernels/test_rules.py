from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from gigabatch.kernels import Eq
from gigabatch.kernels.rules import Matches
from gigabatch.kernels.sources import Panel

# Few codes, so that they repeat; far apart, so that nothing narrower than int64 would do.
CODES = st.lists(st.sampled_from([-(2**63), -1, 0, 1, 5, 2**40, 2**63 - 1]), max_size=30)


@given(rows=CODES, keys=CODES, data=st.data())
def test_equal_pairs_are_those_of_the_dense_mask(
    rows: list[int], keys: list[int], data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(rows)))
    last = data.draw(st.integers(first, len(rows)))
    codes = torch.tensor(rows, dtype=torch.int64), torch.tensor(keys, dtype=torch.int64)
    panel = Panel(torch.zeros(len(keys), 1), {"id": codes[1]}, 0)
    left = data.draw(st.integers(0, len(keys)))
    right = data.draw(st.integers(left, len(keys)))
    row, key = Matches(Eq(codes[0], "id"), panel).inside(slice(first, last), slice(left, right))
    mask = torch.zeros(last - first, right - left, dtype=torch.int64)
    mask.index_put_((row, key), torch.ones_like(row), accumulate=True)
    expected = codes[0][first:last, None] == codes[1][None, left:right]
    assert torch.equal(mask, expected.long())  # each pair once, and no other
