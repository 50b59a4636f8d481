"""What `bench kernels` compares: a loss by the engine, by plain torch and by other packages.

All of a family compute the same number from the same inputs, in the inputs' dtype. For the dense
forms that is kinder than autocast, which takes the logits to float32.
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
BIASES = {"early": -10.0, "late": -98.0}  # of the sigmoid: late, halfway between right and wrong
ITEM = 32  # rows of a batch that an item of MaxSim stands for
TOKENS = {"cpu": (32, 32), "cuda": (196, 77)}  # of its query (an image's patches), of its key
CHUNK_BYTES = 2**28  # of token products that the chunked form makes at a time


@dataclass(frozen=True)
class Inputs:
    """q, k: unit vectors [n, d], or of tokens [n / 32, tokens, d]; scale, bias: 0-dimensional,
    float32. All are leaves that want a gradient."""

    q: Tensor
    k: Tensor
    scale: Tensor
    bias: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.scale, self.bias

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Contender:
    """`pair_bytes`: what it holds at most for each pair of n x n. `missing`: why it cannot run."""

    name: str
    loss: Loss
    ours: bool = False
    pair_bytes: int = 0
    missing: str = ""


def make_inputs(
    family: str, n: int, d: int, logits: str, dtype: torch.dtype, device: torch.device
) -> Inputs:
    """The same on every run. Early in training logits are nearly uniform. Late, a key is close to
    its query, and another pair is close to both: without it the loss and its gradient would be 0,
    and any two contenders would agree. How close differs by row, so that roundings average out."""
    g = torch.Generator(device).manual_seed(n)
    tokens_q, tokens_k = TOKENS[device.type] if family == "maxsim" else (1, 1)
    n = n // ITEM if family == "maxsim" else n

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, d, generator=g, device=device), dim=1)

    def moved(rows: Tensor, most: float) -> Tensor:
        far = most * torch.rand(len(rows), 1, generator=g, device=device)
        return F.normalize(rows + far * unit(len(rows)), dim=1)

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
    """open_clip's form: two products, two matrices of logits."""
    images, texts = b.scale * b.q @ b.k.T, b.scale * b.k @ b.q.T
    return (F.cross_entropy(images, _own(b)) + F.cross_entropy(texts, _own(b))) / 2


def one_matrix(b: Inputs) -> Tensor:
    """The thriftiest dense form: one matrix, its transpose a view."""
    logits = b.scale * b.q @ b.k.T
    return (F.cross_entropy(logits, _own(b)) + F.cross_entropy(logits.T, _own(b))) / 2


def dense_sigmoid(b: Inputs) -> Tensor:
    logits = b.scale * b.q @ b.k.T + b.bias
    signs = 2 * torch.eye(len(b.q), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(b.q)


def chunked_maxsim(b: Inputs) -> Tensor:
    """A few queries at a time; the backward pass makes a chunk's products again, for holding them
    all would take as much as all pairs of tokens."""
    each = b.q.shape[1] * len(b.k) * b.k.shape[1] * b.q.itemsize
    chunks = b.q.split(max(1, CHUNK_BYTES // each))
    scores = [checkpoint(_token_scores, rows, b.k, use_reentrant=False) for rows in chunks]
    return F.cross_entropy(b.scale * torch.cat(scores), _own(b))


def contenders(family: str, device: torch.device, dtype: torch.dtype) -> list[Contender]:
    """Ours and plain torch's of a family; those that cannot run here with the reason."""
    size, backends = dtype.itemsize, {"tiled": "", "triton": _without_triton(device)}
    if family == "sigmoid":
        loss: Callable[[Inputs, str], Tensor] = _engine_sigmoid
        others = [Contender("dense", dense_sigmoid, pair_bytes=5 * size)]
    elif family == "maxsim":
        loss, others = _engine_maxsim, [Contender("chunked", chunked_maxsim)]
    else:
        loss = _engine_softmax
        others = [
            Contender("triton-cached", _cached, True, 4, backends["triton"]),
            Contender("dense", dense, pair_bytes=4 * size),
            Contender("dense-one-matrix", one_matrix, pair_bytes=4 * size),
            Contender("dense-compiled", lambda b: _compiled()(b.q, b.k, b.scale, b.bias),
                      pair_bytes=4 * size),
        ]  # fmt: skip
    ours = [
        Contender(name, _by(loss, name), True, missing=missing)
        for name, missing in backends.items()
    ]
    return ours + others


def _by(loss: Callable[[Inputs, str], Tensor], backend: str) -> Loss:
    return lambda b: loss(b, backend)


def _engine_softmax(b: Inputs, backend: str) -> Tensor:
    return contrastive_loss(b.q, b.k, b.scale, backend=backend)


def _engine_sigmoid(b: Inputs, backend: str) -> Tensor:
    return sigmoid_loss(b.q, b.k, b.scale, b.bias, backend=backend)


def _engine_maxsim(b: Inputs, backend: str) -> Tensor:
    return F.cross_entropy(b.scale * maxsim(b.q, b.k, backend=backend), _own(b))


def _cached(b: Inputs) -> Tensor:
    """With room for all scores, so that the backward pass makes none again."""
    room = 4 * len(b.q) * len(b.k)
    return contrastive_loss(b.q, b.k, b.scale, backend="triton", cache_bytes=room)


@cache
def _compiled() -> Callable[..., Tensor]:
    """Compiled once for all sizes: a compilation takes longer than most sizes do."""
    return torch.compile(lambda *leaves: dense(Inputs(*leaves)), dynamic=True)


def _token_scores(q: Tensor, k: Tensor) -> Tensor:
    products = q.flatten(0, 1) @ k.flatten(0, 1).T
    pairs = products.view(len(q), q.shape[1], len(k), k.shape[1])
    return pairs.max(3).values.float().mean(1)


def _own(b: Inputs) -> Tensor:
    return torch.arange(len(b.q), device=b.q.device)


def _without_triton(device: torch.device) -> str:
    if device.type != "cuda":
        return "needs a GPU"
    return "" if find_spec("triton") else "needs the package triton: pip install triton"
