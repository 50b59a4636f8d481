from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gigabatch.kernels import AbsDiff, Clause, Either, Eq, Ne, Rule, SecondScore, Table
from gigabatch.kernels.rules import blend
from gigabatch.kernels.sources import Panel
from gigabatch.kernels.tile_mask import Matches, OnPanel

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


M, N = 60, 80


def ids(seed: int, n: int) -> torch.Tensor:
    """Codes that are seldom equal."""
    return torch.randint(0, 100, (n,), generator=torch.Generator().manual_seed(seed))


OF_ROWS, OF_KEYS, NUMBER = ids(0, M), ids(1, N), torch.arange(M)
OF_KEYS[:M:9] = OF_ROWS[::9]  # some have their own key's
ROLE, LABEL = NUMBER % 3, NUMBER / 7
TABLE = torch.tensor([[0.5, -torch.inf], [-1.0, 2.0], [0.0, 1.0]])
PANEL = Panel(
    torch.zeros(N, 1),
    {"id": OF_KEYS, "number": torch.arange(N), "role": torch.arange(N) % 2,
     "label": torch.arange(N) / 9, "teacher": torch.arange(2 * N).view(N, 2).cos()},
    5,
    slice(3, 55),
)  # fmt: skip
TEACHER = SecondScore(torch.arange(2 * M).view(M, 2).sin(), "teacher", at_most=0.2)
GAPS = TEACHER.rows.clone()
GAPS[::5, 0] = torch.nan
SAME, OTHER, OWN = Eq(OF_ROWS, "id"), Ne(OF_ROWS, "id"), Eq(NUMBER, "number")
FEW: dict[str, list[Clause]] = {
    "others": [OTHER],
    "others and the own": [Either(OTHER, OWN)],
    "others and all but the own": [Either(OTHER, Ne(NUMBER, "number"))],
    "a table of equals": [Table(ROLE, "role", TABLE, only=SAME)],
    "two": [OTHER, Table(ROLE, "role", TABLE, only=OWN)],
}
MANY: dict[str, list[Clause]] = {
    "nothing": [],
    "a mask": [Either(Eq(ROLE, "role"), OWN)],
    "a group": [Eq(ROLE, "role")],
    "all but a group": [Ne(ROLE, "role")],
    "a teacher's": [TEACHER],
    "a teacher's, not all finite": [SecondScore(GAPS, "teacher", at_most=0.2)],
    "a teacher's and the own": [Either(TEACHER, OWN)],
    "a teacher's and a group": [Either(TEACHER, Eq(ROLE, "role"))],
    "a weight": [AbsDiff(LABEL, "label")],
    "both": [Eq(ROLE, "role"), AbsDiff(LABEL, "label"), Table(ROLE, "role", TABLE)],
}


@pytest.mark.parametrize("logarithms", [False, True])
@pytest.mark.parametrize("many", MANY)
@pytest.mark.parametrize("few", FEW)
def test_few_pairs_weigh_what_the_whole_tile_says(few: str, many: str, logarithms: bool) -> None:
    rule: Rule = [*MANY[many], *FEW[few]]
    rows, columns = slice(7, 51), slice(20, 75)
    keys, scores = PANEL.cut(columns), torch.zeros(44, 55)
    ready = OnPanel(rule, PANEL, logarithms)
    assert len(ready.few) == len(FEW[few])
    assert len(ready.dense) == len(MANY[many])
    mask, logs = blend(rule, rows, keys, scores)
    expected = scores if logs is None else logs
    expected = expected if mask is None else expected.masked_fill(~mask, -torch.inf)
    assert (expected != 0).any()
    found = ready.on(rows, columns, keys, scores)
    assert found is not None
    logits, values = scores.clone(), torch.full_like(scores, 3.0)
    found.add_to(logits)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(found.multiply(values), 3 * expected.exp())


def test_many_equal_pairs_are_left_to_a_mask() -> None:
    ready = OnPanel([Ne(ROLE, "role")], PANEL, True)
    assert not ready.few
    assert len(ready.dense) == 1
