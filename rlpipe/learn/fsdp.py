"""FSDP2: weights, gradients and moments sharded by layer over the ranks; a single process is the case without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rlpipe.learn.strategy import DTYPES, join_group, parameter_groups, trained_parameters
from rlpipe.policy.janus import JanusPolicy
from rlpipe.schema import Config

T = TypeVar("T")

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Fsdp2Strategy:
    """See `Strategy`; float32 masters, gathered in the compute type one layer at a time."""

    def __init__(self, config: Config, policy: JanusPolicy, device: torch.device, world_size: int) -> None:
        self.section, self.policy, self.world_size = config.learner, policy, world_size
        self.device, self.dtype = device, DTYPES[config.policy.dtype]
        # Offloaded weights are brought back layer by layer, which is what sharding does, be it over one rank.
        self.sharded = world_size > 1 or self.section.offload == "parameters"
        # Over one rank too: FSDP2 drops what it has gathered in the backward pass, and would compute with old weights.
        self.anchored = self.sharded
        if self.sharded:
            join_group(self.device)
            self._shard()
        self.parameters = trained_parameters(policy)
        self.optimizers = self._build_optimizers()

    def _shard(self) -> None:
        mixed = self.dtype != torch.float32
        options: dict[str, Any] = {
            "mesh": _mesh(self.device, self.world_size, self.section.replicas),
            # Between layers the residual stream stays float32, see `JanusPolicy.hidden`.
            "mp_policy": MixedPrecisionPolicy(self.dtype, torch.float32, cast_forward_inputs=False)
            if mixed
            else MixedPrecisionPolicy(),
            "offload_policy": CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            if self.section.offload == "parameters"
            else OffloadPolicy(),
        }
        # The VQ tokenizer takes no part in a training step.
        ignored = set(self.policy.part("vqmodel").parameters())
        for layer in self.policy.part("language_model").layers:
            fully_shard(layer, **options)
        fully_shard(self.policy, ignored_params=ignored, **options)

    def _build_optimizers(self) -> list[torch.optim.AdamW]:
        """One for all; where the moments are offloaded one each, so that few moments are on the device at once."""
        section = self.section
        groups = parameter_groups(self.parameters.values(), section.weight_decay)
        sets = [groups]
        if section.offload == "optimizer":
            sets = [[{**group, "params": [p]}] for group in groups for p in group["params"]]
        options = {"lr": section.lr, "betas": tuple(section.betas), "eps": section.eps, "fused": True}
        optimizers = [torch.optim.AdamW(of_one, **options) for of_one in sets]
        for optimizer in optimizers:
            for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
                # What AdamW itself makes at its first step; made here so that a checkpoint can be loaded into it.
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    **{moment: self._make_moment(parameter) for moment in _MOMENTS},
                }
        return optimizers

    def _make_moment(self, parameter: nn.Parameter) -> torch.Tensor:
        if self.section.offload == "optimizer":
            return torch.zeros_like(parameter, device="cpu")
        return torch.zeros_like(parameter)

    def forward(self, function: Callable[..., T], *args: Any) -> T:
        # Under sharding FSDP2 casts by its own policy.
        mixed = self.dtype != torch.float32 and not self.sharded
        with torch.autocast(self.device.type, self.dtype, enabled=mixed):
            return self.policy(function, *args)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        # FSDP2 averages over ranks.
        (loss * self.world_size).backward()

    def gradient_norm(self) -> torch.Tensor:
        for parameter in self.parameters.values():
            # A part that this batch did not use has gradient zero on one rank as on many.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return _whole(get_total_norm([p.grad for p in self.parameters.values()]))

    def update(self, rate: float, norm: torch.Tensor) -> None:
        clip_grads_with_norm_(self.parameters.values(), self.section.clip_norm, norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            if self.section.offload == "optimizer":
                _step_on_device(optimizer)
            else:
                optimizer.step()
        self.discard()

    def discard(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        # Gathered on the device, where the fast links are, wherever the shards wait.
        return _whole(tensor.to(self.device)) if isinstance(tensor, DTensor) else tensor

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The live tensors, sharded as they are."""
        moments = {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}
        state = {f"model.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            state.update({f"optimizer.{k}.{name}": v for k, v in moments[parameter].items()})
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Nothing is left to do: the tensors are the live ones."""


def _mesh(device: torch.device, world_size: int, replicas: int) -> DeviceMesh:
    """All ranks in a line; with replicas a row each, ranks of a row next to each other."""
    if replicas == 1:
        return init_device_mesh(device.type, (world_size,))
    return init_device_mesh(device.type, (replicas, world_size // replicas), mesh_dim_names=("replicate", "shard"))


def _step_on_device(optimizer: torch.optim.AdamW) -> None:
    """Step one parameter, its moments brought to its device and back."""
    ((parameter, state),) = optimizer.state.items()
    host = {moment: state[moment] for moment in _MOMENTS}
    state.update({moment: tensor.to(parameter.device) for moment, tensor in host.items()})
    optimizer.step()
    for moment, tensor in host.items():
        # On the CPU it is the same tensor.
        if state[moment] is not tensor:
            tensor.copy_(state[moment])
    state.update(host)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
