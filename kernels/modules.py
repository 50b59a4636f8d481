"""Loss modules for your own training loop: `ContrastiveLoss` and `SigmoidLoss`.

They replace open_clip's `ClipLoss` and `SigLipLoss`: same constructor and `forward` arguments, same
values, same gradients. They use the default process group if none is passed.

Let W be the number of ranks and L the loss of the global batch. Rank r computes a share L_r, and L
is the mean of the shares. Calling `backward()` on every rank computes the gradients of the sum of
all shares, W L, with respect to each rank's own features. `DistributedDataParallel` averages
parameter gradients over ranks, so each parameter receives the gradient of L: that of one process
with the complete batch. If your loop sums gradients over ranks instead, divide the loss by W.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gigabatch.kernels.losses import GatherMode, contrastive_loss, sigmoid_loss
from gigabatch.kernels.sources import accumulator_dtype, all_sum

DIST_IMPLS: dict[str | None, GatherMode] = {
    None: "gather", "gather": "gather", "bidir": "ring", "shift": "ring", "reduce": "ring",
}  # fmt: skip
FEATURE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class _DistributedLoss(nn.Module):
    """Base class of both losses: process group, argument checks and returned value."""

    global_loss: Tensor | None

    def __init__(
        self, local_loss: bool, rank: int | None, world_size: int | None, use_horovod: bool,
        group: dist.ProcessGroup | None,
    ) -> None:  # fmt: skip
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod=True is not supported; use torch.distributed instead")
        self.local_loss, self.rank, self.world_size = local_loss, rank, world_size
        self.group = group
        self.global_loss = None

    def _find_group(self) -> dist.ProcessGroup | None:
        """Return the process group, by default torch's; None if none is initialized."""
        group = self.group
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup | None):  # new_group returns -100 to others
            raise ValueError("this process is not a member of group; call the loss on its members")
        size, rank = (1, 0) if group is None else (group.size(), dist.get_rank(group))
        if self.world_size not in (None, size):
            raise ValueError(
                f"world_size is {self.world_size}, but the process group has size {size}; call "
                "torch.distributed.init_process_group first, or leave world_size out"
            )
        if self.rank not in (None, rank):
            raise ValueError(f"rank is {self.rank}, but this process has rank {rank}; leave it out")
        return group

    def _result(
        self, share: Tensor, group: dist.ProcessGroup | None, output_dict: bool
    ) -> Tensor | dict[str, Tensor]:
        """Record the global loss, and return the share or its replacement."""
        size = 1 if group is None else group.size()
        self.global_loss = all_sum(share.detach().clone(), group) / size
        loss = share if self.local_loss else _with_value(share, self.global_loss)
        return {"contrastive_loss": loss} if output_dict else loss


class ContrastiveLoss(_DistributedLoss):
    """CLIP's loss over the global batch; replaces open_clip's `ClipLoss`.

    Row i's positive is row i of the other side; all other rows of all ranks are negatives. The
    loss is the mean cross-entropy of both directions (see `contrastive_loss`). Logits are float32
    or wider, also under autocast, and never stored as a matrix.

    `forward` returns the global loss L, the same value on every rank, or with `local_loss` this
    rank's share L_r. The gradient is the same in both cases; see the module's docstring. After each
    call `global_loss` holds L (0-dim, detached) for logging.

    Args:
        local_loss: Return this rank's share instead of the global loss.
        gather_with_grad: Must be True on more than one rank: without the gradients that flow
            through other ranks' features, the gradient is not that of the loss.
        cache_labels: Accepted and ignored; there are no label tensors.
        rank: Only checked against the process group.
        world_size: Only checked against the process group.
        use_horovod: Must be False.
        group: Process group; None: the default group if one is initialized, else this process
            only.
        gather_mode: "gather" holds all features, O(N D); "ring" passes them on, O(n D).
        backend: As in `lse_stats`.
        cache_bytes: As in `lse_stats`.

    Raises:
        ValueError: if `use_horovod` is True.
    """

    def __init__(
        self, local_loss: bool = False, gather_with_grad: bool = True, cache_labels: bool = False,
        rank: int | None = None, world_size: int | None = None, use_horovod: bool = False, *,
        group: dist.ProcessGroup | None = None, gather_mode: GatherMode = "gather",
        backend: str | None = None, cache_bytes: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(local_loss, rank, world_size, use_horovod, group)
        self.gather_with_grad, self.gather_mode = gather_with_grad, gather_mode
        self.backend, self.cache_bytes = backend, cache_bytes

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None, output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        """Compute the loss.

        Args:
            image_features: [n, D] normalized, any floating dtype; n may differ between ranks.
            text_features: [n, D] normalized, same dtype.
            logit_scale: A number, 0-dim or [1]; the factor itself, not its logarithm.
            logit_bias: A number, 0-dim or [1]. It cancels in a softmax: it changes neither value
                nor gradients, and its own gradient is 0.
            output_dict: Return {"contrastive_loss": loss} instead of the loss.

        Returns:
            0-dim, at least float32.

        Raises:
            TypeError: if a dtype is wrong.
            ValueError: if a shape or device is wrong, or a constructor argument contradicts the
                process group.
        """
        group = self._find_group()
        if group is not None and group.size() > 1 and not self.gather_with_grad:
            raise ValueError("gather_with_grad=False gives a wrong gradient on more than one rank; "
                             "pass True or leave it out")  # fmt: skip
        _check_features(image_features, text_features)
        scale = _scalar("logit_scale", logit_scale, image_features)
        share = contrastive_loss(
            image_features, text_features, scale, group=group, gather_mode=self.gather_mode,
            backend=self.backend, cache_bytes=self.cache_bytes,
        )  # fmt: skip
        if logit_bias is not None:
            # DDP waits for a gradient of every parameter, so the bias must be part of the graph.
            share = share + 0 * _scalar("logit_bias", logit_bias, image_features)
        return self._result(share, group, output_dict)


class SigmoidLoss(_DistributedLoss):
    """SigLIP's loss over the global batch; replaces open_clip's `SigLipLoss`.

    The sum over all pairs of the global batch is divided by the batch size (see `sigmoid_loss`).
    `forward` returns this rank's share L_r, which with equal batch sizes is the sum over its own
    rows and all texts, divided by its batch size; with `local_loss=False` it returns the global
    loss L, the same value on every rank. The gradient is the same in both cases; see the module's
    docstring. After each call `global_loss` holds L (0-dim, detached) for logging.

    Args:
        cache_labels: Accepted and ignored; there are no label tensors.
        rank: Only checked against the process group.
        world_size: Only checked against the process group.
        dist_impl: "gather" (or None) holds all texts, O(N D); "bidir", "shift" and "reduce" pass
            them on, O(n D).
        chunk_size: Accepted and ignored; no matrix of logits is held at any size.
        use_horovod: Must be False.
        local_loss: Return this rank's share instead of the global loss.
        group: Process group; None: the default group if one is initialized, else this process
            only.
        backend: As in `lse_stats`.

    Raises:
        ValueError: if `use_horovod` is True or `dist_impl` is unknown.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int | None = None, world_size: int | None = None,
        dist_impl: str | None = None, chunk_size: int = 0, use_horovod: bool = False, *,
        local_loss: bool = True, group: dist.ProcessGroup | None = None,
        backend: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(local_loss, rank, world_size, use_horovod, group)
        if dist_impl not in DIST_IMPLS:
            names = ", ".join(name for name in DIST_IMPLS if name is not None)
            raise ValueError(f"dist_impl is {dist_impl!r}; choose one of {names}")
        self.gather_mode, self.backend = DIST_IMPLS[dist_impl], backend

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None, output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        """Compute the loss.

        Args:
            image_features: [n, D] normalized, any floating dtype; n may differ between ranks.
            text_features: [n, D] normalized, same dtype.
            logit_scale: A number, 0-dim or [1]; the factor itself, not its logarithm.
            logit_bias: A number, 0-dim or [1]; None is 0.
            output_dict: Return {"contrastive_loss": loss} instead of the loss.

        Returns:
            0-dim, at least float32.

        Raises:
            TypeError: if a dtype is wrong.
            ValueError: if a shape or device is wrong, or a constructor argument contradicts the
                process group.
        """
        group = self._find_group()
        _check_features(image_features, text_features)
        scale = _scalar("logit_scale", logit_scale, image_features)
        bias = _scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, image_features)
        share = sigmoid_loss(
            image_features, text_features, scale, bias, group=group, gather_mode=self.gather_mode,
            backend=self.backend,
        )  # fmt: skip
        return self._result(share, group, output_dict)


def _with_value(share: Tensor, value: Tensor) -> Tensor:
    """Return a scalar with the value of `value` and the gradient of `share`."""
    result: Tensor = _WithValue.apply(share, value)  # type: ignore[no-untyped-call]
    return result


class _WithValue(torch.autograd.Function):
    """The value of one scalar with the gradient of another one."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _check_features(image_features: Tensor, text_features: Tensor) -> None:
    images, texts = image_features, text_features
    for name, value in (("image_features", images), ("text_features", texts)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor [n, D]; got {type(value).__name__}")
    if images.ndim != 2 or images.shape != texts.shape:
        raise ValueError("image_features and text_features must have the same shape [n, D]; got "
                         f"{tuple(images.shape)} and {tuple(texts.shape)}")  # fmt: skip
    if images.dtype not in FEATURE_DTYPES or images.dtype != texts.dtype:
        raise TypeError("image_features and text_features must share a floating dtype (bfloat16, "
                        "float16, float32 or float64); got "
                        f"{images.dtype} and {texts.dtype}")  # fmt: skip
    if images.device != texts.device:
        raise ValueError("image_features and text_features must share a device; got "
                         f"{images.device} and {texts.device}")  # fmt: skip


def _scalar(name: str, value: Tensor | float, features: Tensor) -> Tensor:
    """Return a 0-dim tensor on the features' device, differentiable if `value` is."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, 0-dim or [1]; got {type(value).__name__}")
        dtype = accumulator_dtype(features.dtype)
        return torch.tensor(float(value), dtype=dtype, device=features.device)
    if value.shape not in ((), (1,)):
        raise ValueError(f"{name} must be a number, 0-dim or [1]; got shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating; got {value.dtype}")
    if value.device != features.device:
        raise ValueError(f"{name} must be on {features.device}; it is on {value.device}")
    return value.reshape(())
