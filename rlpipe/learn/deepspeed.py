"""DeepSpeed's ZeRO: moments (stage 1), gradients (2) and weights (3) cut into equal flat pieces over the ranks."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rlpipe.learn.strategy import DTYPES, StrategyError, join_group, parameter_groups, trained_parameters
from rlpipe.policy.janus import JanusPolicy
from rlpipe.schema import Config

T = TypeVar("T")

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedStrategy:
    """See `Strategy`. Under bfloat16 the policy itself is bfloat16 and the float32 masters are ZeRO's."""

    anchored = True

    def __init__(self, config: Config, policy: JanusPolicy, device: torch.device, world_size: int) -> None:
        self.world_size, self.device = world_size, device
        deepspeed = _import_deepspeed(self.device)
        from deepspeed.utils import safe_set_full_fp32_param

        self.section, self.stage = config.learner, config.learner.zero_stage
        join_group(self.device)
        self.parameters = trained_parameters(policy)
        groups = parameter_groups(self.parameters.values(), self.section.weight_decay)
        section = self.section
        optimizer = torch.optim.AdamW(groups, lr=section.lr, betas=tuple(section.betas), eps=section.eps, fused=True)
        self.root, unrounded = _Root(policy), self._unrounded(DTYPES[config.policy.dtype])
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.root,
            model_parameters=list(self.parameters.values()),
            optimizer=optimizer,
            config=zero_config(config),
            dist_init_required=False,
        )
        self._make_moments()
        for name, tensor in unrounded.items():
            safe_set_full_fp32_param(self.parameters[name], tensor.to(self.device))
        self.mesh = init_device_mesh(self.device.type, (world_size,))

    def _unrounded(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What trains and is more exact than the compute type, which ZeRO makes its masters from; on the host."""
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return {name: w.to("cpu", copy=True) for name, w in weights.items() if not w.equal(w.to(dtype).to(w.dtype))}

    def _make_moments(self) -> None:
        """What AdamW itself makes at its first step; made here so that a checkpoint can be loaded into it."""
        for flat in self._flats():
            self.optimizer.optimizer.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                **{moment: torch.zeros_like(flat) for moment in _MOMENTS},
            }
        if self.stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _flats(self) -> list[torch.Tensor]:
        """This rank's pieces of the float32 masters, each of many parameters."""
        if self.stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return self.optimizer.single_partition_of_fp32_groups

    def forward(self, function: Callable[..., T], *args: Any) -> T:
        joined = self.engine(function, *args)
        shapes = self.root.surrounding.shapes
        if isinstance(shapes, torch.Size):
            return joined.view(shapes)
        pieces = iter(joined.split([shape.numel() for shape in shapes if shape is not None]))
        return tuple(None if shape is None else next(pieces).view(shape) for shape in shapes)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # ZeRO averages over ranks.
        self.engine.backward(loss * self.world_size)

    def gradient_norm(self) -> torch.Tensor:
        if self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(self.optimizer._get_norm_groups())
        else:
            norm = self.optimizer.scaled_global_norm()
        # ZeRO tells a norm that is not finite as -1.
        return torch.where(norm >= 0, norm, math.inf)

    def update(self, rate: float, norm: torch.Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.stage == 3:
            self.optimizer.averaged_gradients = {}
        else:
            self.optimizer.micro_step_id = -1
            for gradients in (self.optimizer.averaged_gradients, self.optimizer.all_grad_tensors):
                gradients.update(dict.fromkeys(gradients))
        if self.section.offload != "none":
            self.optimizer.reset_cpu_buffers()

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        if tensor.requires_grad:
            return safe_get_full_fp32_param(tensor)
        with GatheredParameters([tensor], enabled=self.stage == 3):
            return tensor.detach().clone()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies, cut by their first axis over the ranks; ZeRO's own pieces do not end where tensors do."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        step = self.optimizer.optimizer.state[self._flats()[0]]["step"]
        state = {}
        for name, parameter in self.parameters.items():
            state[f"model.{name}"] = self._cut(safe_get_full_fp32_param(parameter))
            state[f"optimizer.step.{name}"] = step.clone()
            for moment in _MOMENTS:
                full = safe_get_full_optimizer_state(parameter, moment)
                state[f"optimizer.{moment}.{name}"] = self._cut(full)
        return state

    def _cut(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world_size == 1:
            return tensor.clone()
        return distribute_tensor(tensor, self.mesh, [Shard(0)], src_data_rank=None).clone()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in self.parameters.items():
            safe_set_full_fp32_param(parameter, _whole(state[f"model.{name}"]))
            for moment in _MOMENTS:
                safe_set_full_optimizer_state(parameter, _whole(state[f"optimizer.{moment}.{name}"]), moment)
        steps = {float(tensor) for name, tensor in state.items() if name.startswith("optimizer.step.")}
        for flat in self._flats():
            self.optimizer.optimizer.state[flat]["step"].fill_(max(steps))
        self._publish_masters()

    def _publish_masters(self) -> None:
        """Bring what the forward sees in line with the masters."""
        if self.stage < 3:
            self.optimizer.update_lp_params()
            return
        for number, _ in enumerate(self.optimizer.fp16_groups):
            flat = self.optimizer.fp16_partitioned_groups_flat[number]
            flat.data.copy_(self.optimizer.fp32_partitioned_groups_flat[number].data)
            self.optimizer._unflatten_partitioned_parameters(number)


class _Root(nn.Module):
    """The policy as ZeRO sees it: its layers, and all that surrounds them as one module.

    ZeRO-3 gathers weights module by module, in an order that must be the same on every rank. What a rank runs outside
    of the layers depends on its trajectories; gathered as one module, the order does not. The VQ tokenizer takes no
    part in a training step and stays whole.
    """

    def __init__(self, policy: JanusPolicy) -> None:
        super().__init__()
        self.device = policy.device
        self.surrounding = _Surrounding(policy)
        self.layers = policy.part("language_model").layers
        self.layers[0].register_forward_pre_hook(_with_gradient)
        for module in (self.surrounding, *self.layers):
            module._z3_leaf = True

    def forward(self, function: Callable[..., tuple], *args: Any) -> torch.Tensor:
        start = torch.zeros((), device=self.device, requires_grad=True)
        return self.surrounding(start, function, *args)


class _Surrounding(nn.Module):
    """Everything but the layers and the VQ tokenizer; its forward runs a function of the policy."""

    def __init__(self, policy: JanusPolicy) -> None:
        super().__init__()
        # Past nn.Module, which would take it for a submodule.
        self.__dict__["policy"] = policy
        self.shapes: torch.Size | list[torch.Size | None] = []
        """Of the last forward's tensor or tensors."""
        inside = [(name, part) for name, part in policy.part("language_model").named_children() if name != "layers"]
        beside = [*policy.janus.model.named_children(), ("lm_head", policy.janus.lm_head)]
        beside = [(name, part) for name, part in beside if name not in ("language_model", "vqmodel")]
        for name, part in [*inside, *beside]:
            self.add_module(name, part)

    def forward(self, start: torch.Tensor, function: Callable[..., tuple], *args: Any) -> torch.Tensor:
        """The function's tensors end to end, so that ZeRO-3 sees one backward pass of this module on every rank.

        start: a zero with gradient. ZeRO-3 takes a module's backward pass for done when its inputs have theirs.
        """
        outputs = function(self.policy, *args)
        if isinstance(outputs, torch.Tensor):
            self.shapes = outputs.shape
            return outputs.flatten() + start
        self.shapes = [None if output is None else output.shape for output in outputs]
        return torch.cat([output.flatten() for output in outputs if output is not None]) + start


def _with_gradient(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The first layer's input where nothing before it trains: let a gradient reach it, as `_Surrounding` says."""
    hidden, *rest = args
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    return (hidden, *rest)


def zero_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's configuration of a run; `learner.deepspeed` is merged over it."""
    section = config.learner
    mixed = config.policy.dtype == "bfloat16"
    zero: dict[str, Any] = {"stage": section.zero_stage}
    if section.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if section.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    made = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": section.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": mixed},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }
    return _overlaid(made, section.deepspeed)


def _overlaid(base: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `base`, sections key by key."""
    merged = dict(base)
    for key, value in new.items():
        section = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlaid(merged[key], value) if section else value
    return merged


def _import_deepspeed(device: torch.device) -> Any:
    # Read when deepspeed is imported, and else guessed from the machine.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # Its number among the devices that this process sees; deepspeed reads nothing else.
    os.environ.setdefault("LOCAL_RANK", str(torch.cuda.current_device() if device.type == "cuda" else 0))
    try:
        import deepspeed
    except ImportError as error:
        raise StrategyError(
            "learner.strategy: deepspeed is not installed; run pip install 'rlpipe[deepspeed]' or use fsdp2"
        ) from error
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    # Shared memory in place of gloo on a CPU; deepspeed would compile it first, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
