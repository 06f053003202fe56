"""What the learner asks of whatever keeps its weights, gradients and moments on one process or on many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from rlpipe.policy.janus import JanusPolicy
from rlpipe.schema import Config

T = TypeVar("T")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class StrategyError(RuntimeError):
    """A strategy that cannot run here; the message names the key and the way out."""


class Strategy(Protocol):
    """All ranks call every method at the same time, `forward` and `backward` included."""

    parameters: dict[str, nn.Parameter]
    """What trains, by checkpoint name; under sharding not whole."""
    anchored: bool
    """Every trained parameter must take part in every backward pass, be it with gradient zero."""

    def forward(self, function: Callable[..., T], *args: Any) -> T:
        """`function(policy, *args)` in the compute type, with whole weights wherever a module is called."""
        ...

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradients of a loss of this rank to the sum over ranks; `last` of this step."""
        ...

    def gradient_norm(self) -> torch.Tensor:
        """Global norm of the sum, 0-dimensional and the same on every rank."""
        ...

    def update(self, rate: float, norm: torch.Tensor) -> None:
        """Clip the gradients, whose norm is given, step with this learning rate and forget them."""
        ...

    def discard(self) -> None:
        """Forget the gradients; the weights stay as they are."""
        ...

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """A weight of the policy, trained or not, whole; float32 where it has a float32 master."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`model.<name>` and `optimizer.{step,exp_avg,exp_avg_sq}.<name>` in float32, whole or DTensors."""
        ...

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what a checkpoint was read into: tensors as `state_dict` gave them, changed in place."""
        ...


def make_strategy(config: Config, policy: JanusPolicy, device: torch.device, world_size: int) -> Strategy:
    """The strategy of a configuration around a loaded policy, which it may shard in place and bring to the device."""
    if config.learner.strategy == "deepspeed":
        from rlpipe.learn.deepspeed import DeepSpeedStrategy

        return DeepSpeedStrategy(config, policy, device, world_size)
    from rlpipe.learn.fsdp import Fsdp2Strategy

    return Fsdp2Strategy(config, policy, device, world_size)


def join_group(device: torch.device) -> None:
    """Make this process a group of one if nobody started a group; sharding over one rank needs it all the same."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def trained_parameters(policy: JanusPolicy) -> dict[str, nn.Parameter]:
    """The parameters with gradients, by checkpoint name."""
    named = policy.named_parameters()
    return {name.removeprefix("janus."): parameter for name, parameter in named if parameter.requires_grad}


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, vectors do not."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
