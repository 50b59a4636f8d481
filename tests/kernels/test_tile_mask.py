from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gigabatch.kernels import AbsDiff, Clause, Either, Eq, Ne, Rule, SecondScore, Table
from gigabatch.kernels.rules import combine_clauses
from gigabatch.kernels.sources import KeyBlock
from gigabatch.kernels.tile_mask import BlockRule, EqualPairs

# Few codes, so that they repeat, with large differences, so that they need int64.
CODES = st.lists(st.sampled_from([-(2**63), -1, 0, 1, 5, 2**40, 2**63 - 1]), max_size=30)


@given(rows=CODES, keys=CODES, data=st.data())
def test_equal_pairs_match_the_dense_mask(
    rows: list[int], keys: list[int], data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(rows)))
    last = data.draw(st.integers(first, len(rows)))
    codes = torch.tensor(rows, dtype=torch.int64), torch.tensor(keys, dtype=torch.int64)
    block = KeyBlock(torch.zeros(len(keys), 1), {"id": codes[1]}, 0)
    left = data.draw(st.integers(0, len(keys)))
    right = data.draw(st.integers(left, len(keys)))
    row, key = EqualPairs(Eq(codes[0], "id"), block).in_tile(slice(first, last), slice(left, right))
    mask = torch.zeros(last - first, right - left, dtype=torch.int64)
    mask.index_put_((row, key), torch.ones_like(row), accumulate=True)
    expected = codes[0][first:last, None] == codes[1][None, left:right]
    assert torch.equal(mask, expected.long())  # each pair once, and no others


M, N = 60, 80


def ids(seed: int, n: int) -> torch.Tensor:
    """Draw codes that are rarely equal."""
    return torch.randint(0, 100, (n,), generator=torch.Generator().manual_seed(seed))


OF_ROWS, OF_KEYS, INDEX = ids(0, M), ids(1, N), torch.arange(M)
OF_KEYS[:M:9] = OF_ROWS[::9]  # some rows have the id of their own key
ROLE, LABEL = INDEX % 3, INDEX / 7
TABLE = torch.tensor([[0.5, -torch.inf], [-1.0, 2.0], [0.0, 1.0]])
BLOCK = KeyBlock(
    torch.zeros(N, 1),
    {"id": OF_KEYS, "index": torch.arange(N), "role": torch.arange(N) % 2,
     "label": torch.arange(N) / 9, "teacher": torch.arange(2 * N).view(N, 2).cos()},
    5,
    slice(3, 55),
)  # fmt: skip
TEACHER = SecondScore(torch.arange(2 * M).view(M, 2).sin(), "teacher", at_most=0.2)
GAPS = TEACHER.rows.clone()
GAPS[::5, 0] = torch.nan
SAME, OTHER, SAME_ROW = Eq(OF_ROWS, "id"), Ne(OF_ROWS, "id"), Eq(INDEX, "index")
FEW: dict[str, list[Clause]] = {
    "others": [OTHER],
    "others and the own key": [Either(OTHER, SAME_ROW)],
    "others and all but the own key": [Either(OTHER, Ne(INDEX, "index"))],
    "a table of equals": [Table(ROLE, "role", TABLE, only=SAME)],
    "two": [OTHER, Table(ROLE, "role", TABLE, only=SAME_ROW)],
}
MANY: dict[str, list[Clause]] = {
    "none": [],
    "a mask": [Either(Eq(ROLE, "role"), SAME_ROW)],
    "a group": [Eq(ROLE, "role")],
    "all but a group": [Ne(ROLE, "role")],
    "a teacher's": [TEACHER],
    "a teacher's, not all finite": [SecondScore(GAPS, "teacher", at_most=0.2)],
    "a teacher's and the own key": [Either(TEACHER, SAME_ROW)],
    "a teacher's and a group": [Either(TEACHER, Eq(ROLE, "role"))],
    "a weight": [AbsDiff(LABEL, "label")],
    "both": [Eq(ROLE, "role"), AbsDiff(LABEL, "label"), Table(ROLE, "role", TABLE)],
}


@pytest.mark.parametrize("log_weights_only", [False, True])
@pytest.mark.parametrize("many", MANY)
@pytest.mark.parametrize("few", FEW)
def test_tile_mask_matches_combined_clauses(few: str, many: str, log_weights_only: bool) -> None:
    rule: Rule = [*MANY[many], *FEW[few]]
    rows, columns = slice(7, 51), slice(20, 75)
    keys, scores = BLOCK.slice(columns), torch.zeros(44, 55)
    block_rule = BlockRule(rule, BLOCK, log_weights_only)
    assert len(block_rule.sparse) == len(FEW[few])
    assert len(block_rule.dense) == len(MANY[many])
    mask, log_weights = combine_clauses(rule, rows, keys, scores)
    expected = scores if log_weights is None else log_weights
    expected = expected if mask is None else expected.masked_fill(~mask, -torch.inf)
    assert (expected != 0).any()
    tile_mask = block_rule.on_tile(rows, columns, keys, scores)
    assert tile_mask is not None
    logits, values = scores.clone(), torch.full_like(scores, 3.0)
    tile_mask.add_to(logits)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(tile_mask.multiply(values), 3 * expected.exp())


def test_many_equal_pairs_use_a_mask() -> None:
    block_rule = BlockRule([Ne(ROLE, "role")], BLOCK, True)
    assert not block_rule.sparse
    assert len(block_rule.dense) == 1
