from __future__ import annotations

from typing import Any

import pytest
import torch

from gigabatch.kernels import Eq, Local, Lse, contrastive_loss, lse_stats

Q, K, SCALE = torch.zeros(4, 3), torch.zeros(4, 3), torch.tensor(1.0)
IDS = torch.arange(4)


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"q": torch.zeros(4)}, ValueError, r"must be \[n, D\]; got \(4,\) and \(4, 3\)"),
        ({"k": torch.zeros(4, 3, 1)}, ValueError, r"must be \[n, D\]; got .* and \(4, 3, 1\)"),
        ({"k": torch.zeros(4, 5)}, ValueError, r"must be \[n, D\]; got \(4, 3\) and \(4, 5\)"),
        ({"q": Q.long(), "k": K.long()}, TypeError, r"share a floating dtype; got torch\.int64"),
        ({"k": K.double()}, TypeError, r"got torch\.float32 and torch\.float64"),
        ({"k": K.to("meta")}, ValueError, "must share a device; got cpu, meta"),
        ({"scale": SCALE.to("meta")}, ValueError, "must share a device; got cpu, cpu, meta"),
        ({"scale": torch.ones(1)}, ValueError, r"scale must be 0-dimensional; got \(1,\)"),
        ({"k": torch.zeros(5, 3)}, ValueError, "as many keys as queries"),
        ({"ids_k": IDS}, ValueError, "give ids_q"),
        ({"ids_q": IDS.int()}, TypeError, r"ids_q must be int64; got torch\.int32"),
        ({"ids_q": IDS, "ids_k": IDS.float()}, TypeError, r"ids_k must be int64; got torch\.f"),
        ({"ids_q": IDS[:3]}, ValueError, r"ids_q must be \[4\] on cpu; got \(3,\)"),
        ({"ids_q": IDS[:, None]}, ValueError, r"ids_q must be \[4\] on cpu; got \(4, 1\)"),
        ({"ids_q": IDS, "ids_k": IDS[:2]}, ValueError, r"ids_k must be \[4\] on cpu; got \(2,\)"),
        ({"k": torch.zeros(5, 3), "ids_q": IDS}, ValueError, r"ids_k must be \[5\]"),
        ({"ids_q": IDS.to("meta")}, ValueError, r"ids_q must be \[4\] on cpu; got .* on meta"),
        ({"backend": "fast"}, ValueError, "backend is 'fast'; choose one of reference, tiled"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    changed: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        contrastive_loss(**({"q": Q, "k": K, "scale": SCALE} | changed))


def test_lse_stats_refuses_an_unknown_back_end() -> None:
    keys = Local(K, {"id": IDS})
    with pytest.raises(ValueError, match="backend is 'fast'; choose one of reference, tiled"):
        lse_stats(Q, keys, [Lse("rows", SCALE)], Eq(IDS, "id"), "fast")
