"""Products with weights that stay, in the form that a device multiplies fastest by."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rlpipe.rollout.kernels import Kernels


class Linear:
    """A copy of a linear layer's weights: on a CPU in the panels of `kernels.py`, elsewhere [in, out].

    project = Linear(layer.weight, layer.bias)
    y = project(x)              # [R, out] of [R, in]
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        wide: bool = False,
        kernels: Kernels | None = None,
    ) -> None:
        """weight [out, in], bias [out]. wide: products come in float32, whatever the weight's type is.

        kernels: those of the weight's type, None where there are none.
        """
        self.kernels, self.outputs = kernels, len(weight)
        self.wide = wide and weight.dtype != torch.float32
        self.upcast = self.wide and kernels is None and weight.device.type == "cpu"
        self.weight = self._formed(weight)
        self.bias = None if bias is None else self._formed_bias(bias)

    @torch.no_grad()
    def refresh(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Take over new values, into the same memory."""
        self.weight.copy_(self._formed(weight))
        if bias is not None:
            self.bias.copy_(self._formed_bias(bias))

    def _formed(self, weight: torch.Tensor) -> torch.Tensor:
        if self.kernels is not None:
            return self.kernels.panels(weight)
        return (weight.float() if self.upcast else weight).t().contiguous()

    def _formed_bias(self, bias: torch.Tensor) -> torch.Tensor:
        if self.kernels is not None:
            return F.pad(bias.float(), (0, -len(bias) % 16))
        return bias.to(torch.float32 if self.wide else bias.dtype, copy=True)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.kernels is not None:
            return self.kernels.multiply(x, self.weight, self.bias, self.wide)[:, : self.outputs]
        if self.upcast:
            x = x.float()
        widen = self.wide and not self.upcast
        product = torch.mm(x, self.weight, out_dtype=torch.float32) if widen else x @ self.weight
        return product if self.bias is None else product.add_(self.bias)
