from __future__ import annotations

from typing import Any

import pytest
import torch

from gigabatch.kernels import Eq, Local, Lse, contrastive_loss, lse_stats, sigmoid_loss

Q, K, SCALE = torch.zeros(4, 3), torch.zeros(4, 3), torch.tensor(1.0)
IDS = torch.arange(4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": torch.zeros(4)}, ValueError, r"must be \[n, D\]; got \(4,\) and \(4, 3\)"),
        ({"k": torch.zeros(4, 3, 1)}, ValueError, r"must be \[n, D\]; got .* and \(4, 3, 1\)"),
        ({"k": torch.zeros(4, 5)}, ValueError, r"must be \[n, D\]; got \(4, 3\) and \(4, 5\)"),
        ({"q": Q.long(), "k": K.long()}, TypeError, r"share a floating dtype; got torch\.int64"),
        ({"k": K.double()}, TypeError, r"got torch\.float32 and torch\.float64"),
        ({"k": K.to("meta")}, ValueError, r"must share a device; got \['cpu', 'meta', 'cpu'\]"),
        (
            {"scale": SCALE.to("meta")},
            ValueError,
            r"must share a device; got \['cpu', 'cpu', 'meta'\]",
        ),
        ({"scale": torch.ones(1)}, ValueError, r"scale must be 0-dimensional.*got \(1,\)"),
        ({"k": torch.zeros(5, 3)}, ValueError, "row i belongs to key i; got 4 rows and 5 keys"),
        ({"ids_k": IDS}, ValueError, "give ids_q"),
        ({"ids_q": IDS.int()}, TypeError, r"ids_q must be int64; got torch\.int32"),
        ({"ids_q": IDS, "ids_k": IDS.float()}, TypeError, r"ids_k must be int64; got torch\.f"),
        ({"ids_q": IDS[:3]}, ValueError, r"ids_q must be \[4\] on cpu; got \(3,\)"),
        ({"ids_q": IDS[:, None]}, ValueError, r"ids_q must be \[4\] on cpu; got \(4, 1\)"),
        ({"ids_q": IDS, "ids_k": IDS[:2]}, ValueError, r"ids_k must be \[4\] on cpu; got \(2,\)"),
        ({"k": torch.zeros(5, 3), "ids_q": IDS}, ValueError, r"ids_k must be \[5\]"),
        ({"ids_q": IDS.to("meta")}, ValueError, r"ids_q must be \[4\] on cpu; got .* on meta"),
        ({"scale": torch.tensor(1)}, ValueError, "scale must be .* floating; got .*int64"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \[4\] on cpu; got \(3,\)"),
        ({"bias": IDS}, TypeError, r"bias must be floating; got torch\.int64"),
        ({"same_id": "drop"}, ValueError, "same_id must be positive or exclude.*'drop'"),
        (
            {"k": torch.zeros(5, 3), "ids_q": IDS, "ids_k": torch.arange(5), "same_id": "exclude"},
            ValueError,
            "row i belongs to key i; got 4 rows and 5 keys",
        ),
        (
            {"label_smoothing": 1.0},
            ValueError,
            r"label_smoothing in \[0, 1\); got 'positive' and 1\.0",
        ),
        ({"teacher_q": Q[:3]}, ValueError, r"teacher_q must be \[4, E\]; got \(3, 3\)"),
        ({"teacher_q": Q, "teacher_k": Q[:, :2]}, ValueError, r"teacher_k must be \[4, E\]; got"),
        ({"teacher_q": IDS[:, None]}, TypeError, "teacher_q must be floating, on cpu; got .*int64"),
        ({"teacher_k": Q}, ValueError, "give teacher_q with teacher_k"),
        ({"teacher_q": Q, "label_smoothing": 0.1}, ValueError, "leave out groups and teacher"),
        ({"gather_mode": "tree"}, ValueError, "gather_mode is 'tree'; choose gather or ring"),
        ({"backend": "fast"}, ValueError, "backend is 'fast'; choose one of reference, tiled"),
    ],
)
def test_contrastive_loss_rejects_invalid_arguments(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        contrastive_loss(**({"q": Q, "k": K, "scale": SCALE} | changed))


def test_lse_stats_rejects_unknown_back_end() -> None:
    keys = Local(K, {"id": IDS})
    with pytest.raises(ValueError, match="backend is 'fast'; choose one of reference, tiled"):
        lse_stats(Q, keys, [Lse("rows", SCALE)], Eq(IDS, "id"), "fast")


BIAS = torch.tensor(0.0)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": torch.zeros(4)}, ValueError, r"must be \[n, D\]"),
        ({"k": K.double()}, TypeError, "share a floating dtype"),
        ({"k": torch.zeros(5, 3)}, ValueError, "row i belongs to key i; got 4 rows and 5 keys"),
        ({"bias": torch.zeros(4)}, ValueError, "bias must be 0-dimensional"),
        ({"bias": BIAS.to("meta")}, ValueError, "q, k, scale, bias must share a device"),
        ({"gather_mode": "tree"}, ValueError, "choose gather or ring"),
        ({"backend": "fast"}, ValueError, "backend is 'fast'"),
    ],
)
def test_sigmoid_loss_rejects_invalid_arguments(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sigmoid_loss(**({"q": Q, "k": K, "scale": SCALE, "bias": BIAS} | changed))


@pytest.mark.parametrize("name", ["q", "k", "scale", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_validate_raises_for_non_finite_values(name: str, value: float) -> None:
    arguments = {"q": Q.clone(), "k": K.clone(), "scale": SCALE.clone(), "bias": torch.zeros(4)}
    arguments[name].view(-1)[0] = value
    with pytest.raises(ValueError, match=f"{name} holds 1 values that are NaN or infinite"):
        contrastive_loss(**arguments, validate=True)


def test_validate_raises_for_rows_without_positive() -> None:
    ids_k, counts = torch.tensor([0, 1, 9, 9]), dict[str, torch.Tensor]()
    contrastive_loss(Q, K, SCALE, ids_q=IDS, ids_k=ids_k, counts=counts)
    assert {name: int(count) for name, count in counts.items()} == {
        "rows_without_positive": 2,
        "columns_without_positive": 2,
    }
    with pytest.raises(ValueError, match=r"without a positive: \[2, 2\]"):
        contrastive_loss(Q, K, SCALE, ids_q=IDS, ids_k=ids_k, validate=True)
