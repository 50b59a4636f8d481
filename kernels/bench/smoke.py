"""Short run of the Triton kernels, for a memory checker."""

from __future__ import annotations

import torch

from gigabatch import kernels as K

# Less than one block; several blocks, some partial; full blocks. On a CPU only the first size runs,
# because the interpreter checks only that the calls are valid.
SIZES = (
    (torch.bfloat16, 70, 24), (torch.bfloat16, 280, 64), (torch.bfloat16, 256, 64),
    (torch.float32, 140, 24),
)  # fmt: skip


def smoke() -> None:
    """Run one step of every kernel."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype, n, d in SIZES if device == "cuda" else SIZES[:1]:
        g = torch.Generator(device).manual_seed(0)
        q, k = (
            torch.randn(n, d, generator=g, device=device).to(dtype).requires_grad_()
            for _ in range(2)
        )
        scale, bias = (torch.tensor(value, device=device) for value in (5.0, -3.0))
        ids = torch.arange(n, device=device) % 50
        gate, positives = torch.sigmoid(k.detach()), K.Eq(ids, "id")
        keys, lse = K.Local(k, {"id": ids}), K.Lse("rows", scale)
        losses = [
            K.contrastive_loss(q, k, scale, backend="triton"),
            K.contrastive_loss(q, k, scale, backend="triton", cache_bytes=2**20),
            K.contrastive_loss(q, k, scale, ids_q=ids, same_id="exclude", backend="triton"),
            K.sigmoid_loss(q, k, scale, bias, backend="triton"),
            K.lse_stats(K.GatedCosine(q, gate), keys, [lse], positives, "triton").z[0].mean(),
            K.maxsim(
                q.view(-1, 14 if n % 14 == 0 else 16, d), k.view(-1, n // 2, d), backend="triton"
            ).mean(),
        ]
        for loss in losses:
            loss.backward()
        K.row_top(q, keys, 3, backend="triton")
        for grad in (q.grad, k.grad):
            assert grad is not None
            assert grad.isfinite().all()
    print("smoke run: done")
