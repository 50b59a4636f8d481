"""Implementations that `bench kernels` compares: losses of the engine and of plain torch.

All implementations of a family compute the same number from the same inputs, in the inputs' dtype.
For the dense forms this is faster than autocast, which converts the logits to float32. Losses of
other packages are in `peers.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gigabatch.kernels import contrastive_loss, maxsim, sigmoid_loss

FAMILIES = ("softmax", "sigmoid", "maxsim")
LOGITS = ("early", "late")
SCALES = {"early": 14.3, "late": 100.0}
# Biases of the sigmoid loss. The late one is halfway between the logits of both kinds of pairs.
BIASES = {"early": -10.0, "late": -98.0}
ITEM = 32  # rows of a batch that an item of MaxSim represents
TOKENS = {"cpu": (32, 32), "cuda": (196, 77)}  # per query (patches of an image), per key
CHUNK_BYTES = 2**28  # size of the token products that the chunked form computes at a time


@dataclass(frozen=True)
class Inputs:
    """Leaf tensors that require a gradient.

    `q` and `k` are unit vectors [n, d], or [n / 32, tokens, d]; `scale` and `bias` 0-dim float32.
    """

    q: Tensor
    k: Tensor
    scale: Tensor
    bias: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.scale, self.bias

    def clear(self) -> None:
        """Delete the gradients."""
        for leaf in self.leaves:
            leaf.grad = None


Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Implementation:
    """A loss to measure.

    Attributes:
        name: Name in tables.
        loss: Function that computes the loss.
        is_engine: Whether it is gigabatch's engine.
        pair_bytes: Peak bytes per pair of the n x n pairs.
        missing: Reason why it cannot run here, or "".
    """

    name: str
    loss: Loss
    is_engine: bool = False
    pair_bytes: int = 0
    missing: str = ""


def make_inputs(
    family: str, n: int, d: int, logits: str, dtype: torch.dtype, device: torch.device
) -> Inputs:
    """Make inputs, the same on every run.

    "early": logits are nearly uniform, as early in training. "late": a key is close to its query,
    and a second pair is close to both; otherwise the loss and its gradient would be 0, and any two
    implementations would agree. The distance differs between rows, so that rounding errors average
    out.
    """
    g = torch.Generator(device).manual_seed(n)
    tokens_q, tokens_k = TOKENS[device.type] if family == "maxsim" else (1, 1)
    n = n // ITEM if family == "maxsim" else n

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, d, generator=g, device=device), dim=1)

    def moved(rows: Tensor, most: float) -> Tensor:
        distance = most * torch.rand(len(rows), 1, generator=g, device=device)
        return F.normalize(rows + distance * unit(len(rows)), dim=1)

    if logits == "early":
        q, k = unit(n * tokens_q), unit(n * tokens_k)
    else:
        half = unit((n + 1) // 2 * tokens_q)
        q = moved(torch.cat([half, half])[: n * tokens_q], 0.2)
        k = moved(q.view(n, tokens_q, d)[:, :tokens_k].reshape(-1, d), 0.1)
    if family == "maxsim":
        q, k = q.view(n, tokens_q, d), k.view(n, tokens_k, d)
    scalars = (torch.tensor(value[logits], device=device) for value in (SCALES, BIASES))
    leaves = (q.to(dtype), k.to(dtype), *scalars)
    return Inputs(*(leaf.requires_grad_() for leaf in leaves))


def dense(b: Inputs) -> Tensor:
    """Compute CLIP's loss in open_clip's form: two products, two matrices of logits."""
    images, texts = b.scale * b.q @ b.k.T, b.scale * b.k @ b.q.T
    return (F.cross_entropy(images, _labels(b)) + F.cross_entropy(texts, _labels(b))) / 2


def one_matrix(b: Inputs) -> Tensor:
    """Compute CLIP's loss in the dense form that takes least memory: one matrix of logits."""
    logits = b.scale * b.q @ b.k.T
    return (F.cross_entropy(logits, _labels(b)) + F.cross_entropy(logits.T, _labels(b))) / 2


def dense_sigmoid(b: Inputs) -> Tensor:
    """Compute SigLIP's loss with a matrix of logits."""
    logits = b.scale * b.q @ b.k.T + b.bias
    signs = 2 * torch.eye(len(b.q), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(b.q)


def chunked_maxsim(b: Inputs) -> Tensor:
    """Compute MaxSim's loss for a few queries at a time.

    The backward pass recomputes a chunk's products, since all of them take as much memory as all
    pairs of tokens.
    """
    query_bytes = b.q.shape[1] * len(b.k) * b.k.shape[1] * b.q.itemsize
    chunks = b.q.split(max(1, CHUNK_BYTES // query_bytes))
    scores = [checkpoint(_token_scores, rows, b.k, use_reentrant=False) for rows in chunks]
    return F.cross_entropy(b.scale * torch.cat(scores), _labels(b))


def implementations(family: str, device: torch.device, dtype: torch.dtype) -> list[Implementation]:
    """List a family's implementations in the engine and in plain torch."""
    size, backends = dtype.itemsize, {"tiled": "", "triton": _triton_missing(device)}
    if family == "sigmoid":
        loss: Callable[[Inputs, str], Tensor] = _engine_sigmoid
        others = [Implementation("dense", dense_sigmoid, pair_bytes=5 * size)]
    elif family == "maxsim":
        loss, others = _engine_maxsim, [Implementation("chunked", chunked_maxsim)]
    else:
        loss = _engine_softmax
        others = [
            Implementation("triton-cached", _cached, True, 4, backends["triton"]),
            Implementation("dense", dense, pair_bytes=4 * size),
            Implementation("dense-one-matrix", one_matrix, pair_bytes=4 * size),
            Implementation("dense-compiled", lambda b: _compiled()(b.q, b.k, b.scale, b.bias),
                           pair_bytes=4 * size),
        ]  # fmt: skip
    engine = [
        Implementation(name, _with_backend(loss, name), True, missing=missing)
        for name, missing in backends.items()
    ]
    return engine + others


def _with_backend(loss: Callable[[Inputs, str], Tensor], backend: str) -> Loss:
    return lambda b: loss(b, backend)


def _engine_softmax(b: Inputs, backend: str) -> Tensor:
    return contrastive_loss(b.q, b.k, b.scale, backend=backend)


def _engine_sigmoid(b: Inputs, backend: str) -> Tensor:
    return sigmoid_loss(b.q, b.k, b.scale, b.bias, backend=backend)


def _engine_maxsim(b: Inputs, backend: str) -> Tensor:
    return F.cross_entropy(b.scale * maxsim(b.q, b.k, backend=backend), _labels(b))


def _cached(b: Inputs) -> Tensor:
    """Compute CLIP's loss with all scores kept, so that the backward pass recomputes none."""
    cache_bytes = 4 * len(b.q) * len(b.k)
    return contrastive_loss(b.q, b.k, b.scale, backend="triton", cache_bytes=cache_bytes)


@cache
def _compiled() -> Callable[..., Tensor]:
    """Compile `dense` once for all sizes: one compilation takes longer than most steps."""
    return torch.compile(lambda *leaves: dense(Inputs(*leaves)), dynamic=True)


def _token_scores(q: Tensor, k: Tensor) -> Tensor:
    products = q.flatten(0, 1) @ k.flatten(0, 1).T
    pairs = products.view(len(q), q.shape[1], len(k), k.shape[1])
    return pairs.max(3).values.float().mean(1)


def _labels(b: Inputs) -> Tensor:
    return torch.arange(len(b.q), device=b.q.device)


def _triton_missing(device: torch.device) -> str:
    if device.type != "cuda":
        return "needs a GPU"
    return "" if find_spec("triton") else "needs the package triton: pip install triton"
