"""DeepSpeed behind a small interface: embed, backward, one reduction, step; full state out and in.

Everything that depends on how DeepSpeed's ZeRO stages differ is in this file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gigabatch.trainer.config import Config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.optim import adamw, tower_groups

MOMENTS = ("exp_avg", "exp_avg_sq")
State = dict[str, Tensor]


class Engine:
    """The towers under DeepSpeed, any ZeRO stage.

    A step is: `with engine.accumulating(): engine.backward(...)`, any number of times, then
    `engine.step(lr)`. Gradients are averaged over ranks, in one reduction however many backwards.
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
        self._norm = 0.0
        if self.stage == 0:
            self.adamw.register_step_pre_hook(
                partial(self._clip, config.train.max_grad_norm or torch.inf)
            )
        self._make_moments()
        self.steps = 0
        """Optimizer steps applied, which AdamW's bias correction counts."""

    def __call__(self, *args: Any) -> dict[str, Tensor]:
        return self.ds(*args)

    def train(self, mode: bool) -> None:
        self.ds.module.train(mode)

    def accumulating(self) -> AbstractContextManager[None]:
        """Backwards inside add up locally; on leaving, ZeRO 1 to 3 reduce once. (ZeRO 0 does
        not know this context: unmanaged accumulation reduces once in `step`.)"""
        return nullcontext() if self.stage == 0 else self._coalesced()

    @contextmanager
    def _coalesced(self) -> Iterator[None]:
        with self.ds.coalesce_grad_reduction():
            yield
            self._poison_unless_finite()

    def _poison_unless_finite(self) -> None:
        # ZeRO skips a step cleanly only when it finds the fault itself; withholding `step` after
        # the reduction corrupts the next one. So all ranks plant a NaN and let it find that.
        if not self._all_finite():
            for parameter in self.trained.values():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.nan)

    def _all_finite(self) -> bool:
        grads = [p.grad for p in self.trained.values() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(grads)) if grads else torch.zeros(1)
        return not self.world.any(not bool(torch.isfinite(norms).all()))[0]

    def backward(self, loss: Tensor) -> None:
        self.ds.backward(loss)

    def step(self, lr: float) -> tuple[bool, float]:
        """Apply the accumulated gradient; (applied, gradient norm before clipping).

        Where a gradient is not finite on any rank: not applied, and nothing changed on any.
        """
        for group in self.adamw.param_groups:
            group["lr"] = lr
        if self.stage > 0:
            self.ds.step()
            applied, norm = bool(self.ds.was_step_applied()), self.ds.get_global_grad_norm()
        elif applied := self._all_finite():
            self.ds.step()
            norm = self._norm
        else:
            self.ds.zero_grad()
        self.steps += applied
        return applied, float(norm) if applied else float("nan")

    def _clip(self, limit: float, *_: Any) -> None:
        # DeepSpeed clips at ZeRO 0 as well, but does not tell the norm.
        parameters = list(self.trained.values())
        self._norm = float(nn.utils.clip_grad_norm_(parameters, limit))

    def _make_moments(self) -> None:
        """Zero moments for what AdamW steps: weights, or ZeRO's flat fp32 shards of them. AdamW
        makes them in its first step, but a checkpoint must find them before that."""
        zero = self.ds.optimizer
        stepped = {
            0: lambda: list(self.trained.values()),
            1: lambda: zero.single_partition_of_fp32_groups,
            2: lambda: zero.single_partition_of_fp32_groups,
            3: lambda: zero.fp32_partitioned_groups_flat,
        }[self.stage]()
        for tensor in stepped:
            moments = {moment: torch.zeros_like(tensor) for moment in MOMENTS}
            self.adamw.state[tensor] = {"step": torch.zeros(()), **moments}
        if self.stage in (1, 2):
            # DeepSpeed would link its fragments when only the first parameter group has moments.
            zero._lazy_init_hp_params_optimizer_state()

    def _count_from(self, steps: int) -> None:
        self.steps = steps
        for state in self.adamw.state.values():
            state["step"].fill_(steps)

    def weights(self) -> State:
        """All weights and buffers, full, float32, on rank 0; elsewhere nothing. A collective."""
        full: State = {}
        for name, tensor in self.live_weights():
            if self.world.is_main:
                full[name] = cpu_copy(tensor)
        return full

    def live_weights(self) -> Iterator[tuple[str, Tensor]]:
        """All weights and buffers, each whole until the next is asked for. A collective."""
        # What `load_state_dict` will ask for: not all buffers, but both names of tied weights.
        for name, tensor in self.ds.module.state_dict(keep_vars=True).items():
            with _gathered(tensor, self.stage):
                yield name, tensor.detach()

    def moments(self) -> State:
        """AdamW's moments of every trained weight, as `NAME.exp_avg` and `NAME.exp_avg_sq`, full,
        on rank 0; elsewhere nothing. A collective."""
        full: State = {}
        for name, parameter in self.trained.items():
            for moment in MOMENTS:
                value = self._moment(parameter, moment)
                if self.world.is_main:
                    full[f"{name}.{moment}"] = cpu_copy(value)
        return full

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        if self.stage == 0:
            return self.adamw.state[parameter][moment]
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, moment)

    def load_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Put back what `moments` gave, at any world size and ZeRO stage. The weights themselves
        are loaded into the module before the Engine is made."""
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
            # `safe_set_full` fails where the world size does not divide the weight: cut it here.
            share = parameter.ds_tensor.numel()
            padded = nn.functional.pad(
                value.flatten(), (0, share * self.world.size - value.numel())
            )
            mine = padded.narrow(0, share * self.world.rank, share)
            safe_set_local_optimizer_state(parameter, mine, moment)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The run in DeepSpeed's terms. Mixed precision is the towers' own autocast, so that weights
    and reductions stay float32 here and an evaluation without DeepSpeed computes the same."""
    stage = config.train.zero_stage
    return {
        "train_micro_batch_size_per_gpu": config.batch.micro_size,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        # Its default is 1.0 since mid-2026. Stage 0 is clipped in Engine._clip.
        "gradient_clipping": config.train.max_grad_norm if stage > 0 else 0.0,
        "managed_gradient_accumulation": stage > 0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def cpu_copy(tensor: Tensor) -> Tensor:
    """In host memory, shared with nothing."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _gathered(tensor: Tensor, stage: int) -> AbstractContextManager[Any]:
    if stage < 3 or not isinstance(tensor, nn.Parameter):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([tensor])


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists; a single process has none
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # Otherwise the first start compiles this extension, 40 s a worker; gloo serves without it.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
