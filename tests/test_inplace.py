"""temporal_shift_: the values of temporal_shift, in place, with everything autograd asks of an in-place function."""

import itertools

import pytest
import torch
from cases import CASES
from inputs import COMPILED, LAYOUTS, SHAPES, make
from test_ops import random_like

import tempops
from tempops.ops._contract import Shape

SHIFT = CASES[0]
MODES = ("bidirectional", "reversed", "causal")
backends = pytest.mark.parametrize("backend", ("eager", *COMPILED))


def clips(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Two clips of four frames, without a gradient."""
    return make(SHIFT, Shape(2, 4, 16, 5, 5), "contiguous", dtype)[0].detach()


@backends
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values(backend, mode, layout):
    least = 1 if mode == "causal" else 2
    for shape, dtype, fold_div in itertools.product(SHAPES, (torch.float32, torch.float64, torch.bfloat16), (4, least)):
        x, n_segment = make(SHIFT, shape, layout, dtype)
        x = x.detach()
        with tempops.backend("eager"):
            expected = tempops.temporal_shift(x, n_segment, fold_div, mode)
        with tempops.backend(backend):
            out = tempops.temporal_shift_(x, n_segment, fold_div, mode)
        assert out is x and torch.equal(x, expected)


@backends
def test_untouched_channels_are_not_written(backend):
    """The channels that stay lie in memory that may not be written."""
    x = clips()
    still = x[:, 4:].clone()
    version = x[:, 4:]._version
    with tempops.backend(backend):
        tempops.temporal_shift_(x, 4, 8)
    assert torch.equal(x[:, 4:], still) and x._version == version + 1


@backends
def test_gradient(backend):
    x = clips(torch.float64)[:, :8].contiguous().requires_grad_()

    def inplace(x):
        with tempops.backend(backend):
            return tempops.temporal_shift_(x * 1, 4, 4)

    assert torch.autograd.gradcheck(inplace, x) and torch.autograd.gradgradcheck(inplace, x)
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(inplace(x), x, dy)
    (expected,) = torch.autograd.grad(tempops.temporal_shift(x, 4, 4), x, dy)
    assert torch.equal(dx, expected)


@backends
def test_residual_is_not_corrupted_silently(backend):
    """TSM's own in-place shift changed what the residual branch still needed; here autograd notices."""
    x = clips().requires_grad_()
    a = x * 1
    kept = a * a  # its backward needs a as it is
    with tempops.backend(backend):
        tempops.temporal_shift_(a, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


@backends
def test_leaf(backend):
    x = clips().requires_grad_()
    with tempops.backend(backend), pytest.raises(RuntimeError, match="leaf"):
        tempops.temporal_shift_(x, 4)
    with torch.no_grad(), tempops.backend(backend):
        tempops.temporal_shift_(x, 4)


def test_the_bare_entry():
    x = torch.randn(8, 16, 5, 5)
    version = x._version
    assert torch.ops.tempops.temporal_shift_(x, 4) is None and x._version == version + 1
    y = x.requires_grad_() * 1
    with pytest.raises(RuntimeError, match=r"no gradient; call tempops.temporal_shift_"):
        torch.ops.tempops.temporal_shift_(y, 4)
    torch.library.opcheck(torch.ops.tempops.temporal_shift_.default, (x.detach(), 4, 8, "causal"))


@pytest.mark.parametrize("grad", (False, True))
def test_compile(grad):
    x = torch.randn(8, 16, 5, 5, requires_grad=grad)
    call = torch.compile(lambda x: tempops.temporal_shift_(x * 2, 4) * 3, fullgraph=True, backend="aot_eager")
    out = call(x)
    assert torch.equal(out, tempops.temporal_shift(x * 2, 4) * 3)
    if grad:
        dy = torch.randn_like(out)
        (dx,) = torch.autograd.grad(out, x, dy)
        assert torch.equal(dx, 2 * torch.autograd.grad(tempops.temporal_shift(x, 4), x, dy * 3)[0])


def test_inference_mode():
    with torch.inference_mode():
        x = torch.randn(8, 16, 5, 5)
        expected = tempops.temporal_shift(x, 4)
        assert torch.equal(tempops.temporal_shift_(x, 4), expected)


def test_forward_mode():
    """The tangent moves as the values do."""
    x, direction = clips(), random_like(clips())
    expected = tempops.temporal_shift(direction, 4)
    tangent = torch.func.jvp(lambda x: tempops.temporal_shift_(x.clone(), 4), (x,), (direction,))[1]
    assert torch.equal(tangent, expected)
