"""Training engine: DeepSpeed behind a small interface, the same for all ZeRO stages.

Everything that differs between the stages is in this file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gigabatch.trainer.config import Config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.optim import adamw, tower_groups

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's moments of a weight; also suffixes of names in a checkpoint."""
State = dict[str, Tensor]


class Engine:
    """The towers under DeepSpeed, at any ZeRO stage.

    A step calls `engine.backward(...)` any number of times inside `with engine.accumulating():`,
    then `engine.step(lr)`. Gradients are averaged over ranks in one reduction per step.
    """

    def __init__(self, towers: nn.Module, config: Config, world: World) -> None:
        self.stage, self.world = config.train.zero_stage, world
        deepspeed = _import_deepspeed(world.device)
        optimizer = adamw(
            tower_groups(towers.named_parameters(), config.optimizer.weight_decay),
            config.optimizer,
        )
        self.ds, wrapped, _, _ = deepspeed.initialize(
            model=towers, optimizer=optimizer, config=deepspeed_config(config)
        )
        self.adamw: torch.optim.AdamW = getattr(wrapped, "optimizer", wrapped)
        self.named = dict(towers.named_parameters())
        self.trained = {name: p for name, p in self.named.items() if p.requires_grad}
        self._grad_norm = 0.0
        if self.stage == 0:
            self.adamw.register_step_pre_hook(
                partial(self._clip, config.train.max_grad_norm or torch.inf)
            )
        self._create_moments()
        self.steps = 0
        """Optimizer steps applied; AdamW's bias correction counts them."""

    def __call__(self, *args: Any) -> dict[str, Tensor]:
        """Run `Towers.forward`."""
        outputs: dict[str, Tensor] = self.ds(*args)
        return outputs

    def train(self, mode: bool) -> None:
        """Set training or evaluation mode."""
        self.ds.module.train(mode)

    def accumulating(self) -> AbstractContextManager[None]:
        """Return a context in which gradients accumulate locally; ZeRO 1 to 3 reduce at its end.

        ZeRO 0 does not support DeepSpeed's context. Without managed accumulation, it reduces once,
        in `step`.
        """
        return nullcontext() if self.stage == 0 else self._coalesced()

    @contextmanager
    def _coalesced(self) -> Iterator[None]:
        with self.ds.coalesce_grad_reduction():
            yield
            self._poison_unless_finite()

    def _poison_unless_finite(self) -> None:
        # ZeRO skips a step cleanly only if it detects the overflow itself, and omitting `step`
        # after the reduction would corrupt the next step. So all ranks write NaN, which it detects.
        if not self._all_finite():
            for parameter in self.trained.values():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.nan)

    def _all_finite(self) -> bool:
        grads = [p.grad for p in self.trained.values() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(grads)) if grads else torch.zeros(1)
        return not self.world.any(not bool(torch.isfinite(norms).all()))[0]

    def backward(self, loss: Tensor) -> None:
        """Backpropagate a scalar; gradients add up until `step`."""
        self.ds.backward(loss)

    def step(self, lr: float) -> tuple[bool, float]:
        """Apply the accumulated gradient. Collective: every rank must call it.

        Args:
            lr: Learning rate.

        Returns:
            (applied, gradient norm before clipping). If a gradient is not finite on any rank, no
            rank applies it, nothing changes, and the norm is NaN.
        """
        for group in self.adamw.param_groups:
            group["lr"] = lr
        if self.stage > 0:
            self.ds.step()
            applied, norm = bool(self.ds.was_step_applied()), self.ds.get_global_grad_norm()
        elif applied := self._all_finite():
            self.ds.step()
            norm = self._grad_norm
        else:
            self.ds.zero_grad()
        self.steps += applied
        return applied, float(norm) if applied else float("nan")

    def _clip(self, limit: float, *_: Any) -> None:
        # DeepSpeed could clip at ZeRO 0 too, but does not return the norm.
        parameters = list(self.trained.values())
        self._grad_norm = float(nn.utils.clip_grad_norm_(parameters, limit))

    def _create_moments(self) -> None:
        """Create the moments as zeros; AdamW would create them only in its first step.

        A checkpoint may be loaded or saved before that. At ZeRO 0, AdamW updates the weights
        themselves; from ZeRO 1, flat fp32 shards of them.
        """
        zero: Any = self.ds.optimizer
        stepped: Iterable[Tensor]
        if self.stage == 0:
            stepped = self.trained.values()
        elif self.stage in (1, 2):
            stepped = zero.single_partition_of_fp32_groups
        else:
            stepped = zero.fp32_partitioned_groups_flat
        for tensor in stepped:
            moments = {moment: torch.zeros_like(tensor) for moment in MOMENTS}
            self.adamw.state[tensor] = {"step": torch.zeros(()), **moments}
        if self.stage in (1, 2):
            # DeepSpeed would link its fragments once the first parameter group has moments, before
            # the second group has them.
            zero._lazy_init_hp_params_optimizer_state()

    def _count_from(self, steps: int) -> None:
        self.steps = steps
        for state in self.adamw.state.values():
            state["step"].fill_(steps)

    def weights(self) -> State:
        """Return all weights and buffers, complete and in float32; {} on ranks other than 0.

        Collective: every rank must call it.
        """
        full: State = {}
        for name, tensor in self.live_weights():
            if self.world.is_main:
                full[name] = cpu_copy(tensor)
        return full

    def live_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all weights and buffers; a gathered tensor is valid until the next one.

        Collective: every rank must call it and exhaust it.
        """
        # `state_dict` has the names that `load_state_dict` needs: those of persistent buffers only,
        # and both names of tied weights.
        for name, tensor in self.ds.module.state_dict(keep_vars=True).items():
            with _gathered(tensor, self.stage):
                yield name, tensor.detach()

    def moments(self) -> State:
        """Return AdamW's moments of every trained weight; {} on ranks other than 0.

        Collective: every rank must call it. Names are `NAME.exp_avg` and `NAME.exp_avg_sq`; tensors
        are complete.
        """
        full: State = {}
        for name, parameter in self.trained.items():
            for moment in MOMENTS:
                value = self._moment(parameter, moment)
                if self.world.is_main:
                    full[f"{name}.{moment}"] = cpu_copy(value)
        return full

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        value: Tensor
        if self.stage == 0:
            value = self.adamw.state[parameter][moment]
        else:
            from deepspeed.utils import safe_get_full_optimizer_state

            value = safe_get_full_optimizer_state(parameter, moment)
        return value

    def load_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Restore the result of `moments`, at any world size and ZeRO stage.

        Weights are not restored: load them into the module before the Engine is created.
        """
        for name, parameter in self.trained.items():
            for moment in MOMENTS:
                self._set_moment(parameter, moment, moments[f"{name}.{moment}"])
        self._count_from(steps)

    def _set_moment(self, parameter: Any, moment: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        value = value.to(self.world.device)
        if self.stage == 0:
            self.adamw.state[parameter][moment].copy_(value)
        elif self.stage == 3:
            # safe_set_full_optimizer_state fails if the weight's size is not a multiple of the
            # world size, so the moment is split here.
            size = parameter.ds_tensor.numel()
            padded = nn.functional.pad(value.flatten(), (0, size * self.world.size - value.numel()))
            shard = padded.narrow(0, size * self.world.rank, size)
            safe_set_local_optimizer_state(parameter, shard, moment)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)


def deepspeed_config(config: Config) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a run.

    The towers use autocast for mixed precision: weights and reductions stay float32, and an
    evaluation without DeepSpeed computes the same values.
    """
    stage = config.train.zero_stage
    return {
        "train_micro_batch_size_per_gpu": config.batch.micro_size,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        # DeepSpeed's default is 1.0 since mid-2026. Engine._clip clips stage 0.
        "gradient_clipping": config.train.max_grad_norm if stage > 0 else 0.0,
        "managed_gradient_accumulation": stage > 0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def cpu_copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy in host memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _gathered(tensor: Tensor, stage: int) -> AbstractContextManager[Any]:
    """Return a context in which a weight is complete, even if ZeRO 3 shards it."""
    if stage < 3 or not isinstance(tensor, nn.Parameter):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    context: AbstractContextManager[Any] = GatheredParameters([tensor])
    return context


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it; a single process has none.
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # Otherwise the first start compiles this extension, in 40 s per worker; gloo does not need it.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
