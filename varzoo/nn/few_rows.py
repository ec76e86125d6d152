"""A linear layer for decoding on a CPU, where a few rows meet a large weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FewRowsLinear(nn.Linear):
    """`nn.Linear` without bias whose product is taken as (W x^T)^T where that is faster: 9 to 128 rows on a CPU.

    BLAS splits a product over the rows of its result. Rows of x, the tokens of a step, are too few to split, rows of W
    are plenty. Below 9 rows both ways only wait for W to be read; above 128 they are even. Values differ by rounding.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1]
        if x.device.type != "cpu" or torch.is_grad_enabled() or not 9 <= rows.numel() <= 128:
            return F.linear(x, self.weight)
        return (self.weight @ x.flatten(0, -2).T).T.unflatten(0, rows)
