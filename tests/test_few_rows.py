"""A product by few rows equals the usual one, whichever way it is taken."""

import pytest
import torch
from torch.nn import functional as F

from varzoo.nn.few_rows import FewRowsLinear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (), (2,), (3, 3), (4, 16, 2), (129,), (2, 0)])
def test_equals_linear_on_both_sides_of_its_limits(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = FewRowsLinear(24, 40, bias=bias)
    x = torch.randn(*shape, 24)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_linear() -> None:
    torch.manual_seed(0)
    layer = FewRowsLinear(24, 40)
    x = torch.randn(16, 24, requires_grad=True)
    ours = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
    theirs = torch.autograd.grad(F.linear(x, layer.weight, layer.bias).square().sum(), [x, layer.weight])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
