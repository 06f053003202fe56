"""Products with weights that stay, in the form that a device multiplies fastest by."""

from __future__ import annotations

import torch

_TYPICAL_ROWS = 64
"""What oneDNN chooses a weight's layout for; others are as fast with it."""


class Linear:
    """A copy of a linear layer's weights. On a CPU it is packed for oneDNN: about twice as fast as a plain product.

    project = Linear(layer.weight, layer.bias)
    y = project(x)              # [R, out] of [R, in]
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, wide: bool = False) -> None:
        """weight [out, in], bias [out]. wide: products come in float32, whatever the weight's type is."""
        self.on_cpu = weight.device.type == "cpu"
        self.wide = wide and weight.dtype != torch.float32
        self.packed = self.on_cpu and torch.backends.mkldnn.is_available()
        self.weight = self._formed(weight)
        self.bias = None if bias is None else bias.to(torch.float32 if wide else bias.dtype, copy=True)

    @torch.no_grad()
    def refresh(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Take over new values, into the same memory where the form allows."""
        if self.packed:
            self.weight = self._formed(weight)
        else:
            self.weight.copy_(weight.t())
        if bias is not None:
            self.bias.copy_(bias)

    def _formed(self, weight: torch.Tensor) -> torch.Tensor:
        if self.wide and self.on_cpu:
            weight = weight.float()
        if self.packed:
            return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)
        return weight.t().contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.wide and self.on_cpu:
            x = x.float()
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        product = (
            torch.mm(x, self.weight, out_dtype=torch.float32) if self.wide and not self.on_cpu else x @ self.weight
        )
        return product if self.bias is None else product.add_(self.bias)
