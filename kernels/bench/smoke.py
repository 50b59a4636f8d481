"""A short run of the Triton kernels, for a memory checker to watch."""

from __future__ import annotations

import torch

from gigabatch import kernels as K


def smoke() -> None:
    """A step of each kind of kernel, on sizes that fill no block."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.bfloat16, torch.float32):
        g = torch.Generator(device).manual_seed(0)
        q, k = (
            torch.randn(70, 24, generator=g, device=device).to(dtype).requires_grad_()
            for _ in range(2)
        )
        scale, bias = (torch.tensor(value, device=device) for value in (5.0, -3.0))
        ids = torch.arange(70, device=device) % 50
        gate, own = torch.sigmoid(k.detach()), K.Eq(ids, "id")
        keys, lse = K.Local(k, {"id": ids}), K.Lse("rows", scale)
        losses = [
            K.contrastive_loss(q, k, scale, backend="triton"),
            K.contrastive_loss(q, k, scale, backend="triton", cache_bytes=2**20),
            K.contrastive_loss(q, k, scale, ids_q=ids, same_id="exclude", backend="triton"),
            K.sigmoid_loss(q, k, scale, bias, backend="triton"),
            K.lse_stats(K.GatedCosine(q, gate), keys, [lse], own, "triton").z[0].mean(),
            K.maxsim(q.view(7, 10, 24), k.view(10, 7, 24), backend="triton").mean(),
        ]
        for loss in losses:
            loss.backward()
        K.row_top(q, keys, 3, backend="triton")
        for grad in (q.grad, k.grad):
            assert grad is not None
            assert grad.isfinite().all()
    print("smoke run: done")
