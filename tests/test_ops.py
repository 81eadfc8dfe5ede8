"""Every property over every case, back end, dtype and layout."""

import dataclasses
import gc
import itertools
import os
import subprocess
import sys

import pytest
import torch
from cases import CASES, Case, why_not
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import BASE, COMPILED, DTYPES, INTERPRETED, NATIVE, SHAPES, as_tuple, fits, layouts, make
from torch.utils._python_dispatch import TorchDispatchMode

import tempops
from tempops.ops._contract import Shape

cases = pytest.mark.parametrize("case", CASES, ids=str)
compiled = pytest.mark.parametrize("backend", COMPILED)
NAMED = {case.name: case for case in CASES}
SMALL = Shape(2, 3, 4, 3, 4)
# Triton's interpreter is slow, so what checks entries rather than values has one case an op there, and one clip;
# test_double_backward_is_that_of_eager has them all.
entries = pytest.mark.parametrize("case", [case for case in CASES if case.benchmark or not INTERPRETED], ids=str)
TINY = SMALL._replace(N=1) if INTERPRETED else SMALL


def run(case: Case, backend: str, x, n_segment, *others, grads=None):
    """The outputs and the gradients to every input, on one back end, for the given output gradients."""
    with tempops.backend(backend):
        outs = as_tuple(case.call(x, n_segment, *others))
    if grads is None:
        grads = [random_like(out) for out in outs]
    # The backward runs outside the context: the back end of the forward must run it.
    return outs, torch.autograd.grad(outs, (x, *others), grads, retain_graph=True), grads


def random_like(out):
    """Random values in the shape, dtype and layout of `out`."""
    return torch.empty_like(out, requires_grad=False).copy_(torch.randn(out.shape, dtype=torch.float64))


def assert_as_good_as_eager(case: Case, backend: str, inputs: tuple) -> None:
    """Moves bit for bit; arithmetic within twice eager's error against float64, outputs and gradients alike.

    The worst error of a small tensor is a matter of luck: where eager is lucky, one unit in the last place of the
    largest value is allowed, and the worst of up to four draws of the output gradients counts on either side.
    """
    x, n_segment, *others = inputs
    wide = [a.detach().double().requires_grad_() for a in (x, *others)]
    mine_worst, allowed = [], []
    for _ in range(4):
        outs, dins, grads = run(case, backend, *inputs)
        eager_outs, eager_dins, _ = run(case, "eager", *inputs, grads=grads)
        results, eager_results = (*outs, *dins), (*eager_outs, *eager_dins)
        if case.moves:
            assert all(torch.equal(mine, eager) for mine, eager in zip(results, eager_results))
            return
        exact_outs, exact_dins, _ = run(case, "eager", wide[0], n_segment, *wide[1:], grads=[g.double() for g in grads])
        mine_worst.append([])
        allowed.append([])
        for mine, eager, exact in zip(results, eager_results, (*exact_outs, *exact_dins)):
            assert mine.shape == exact.shape and mine.dtype == x.dtype and torch.isfinite(mine).all()
            if mine.numel():
                unit = torch.finfo(x.dtype).eps * exact.abs().max()
                error = 2 * (eager.double() - exact).abs().max() + unit
                allowed[-1].append(1e3 * unit if x.dtype == torch.float64 else error)
                mine_worst[-1].append((mine.double() - exact).abs().max())
        if all(max(errors) <= max(bounds) for errors, bounds in zip(zip(*mine_worst), zip(*allowed))):
            return
    raise AssertionError(f"errors {mine_worst}, of which at most {allowed} are allowed")


@cases
@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(case, backend, dtype):
    for layout in layouts(case):
        assert_as_good_as_eager(case, backend, make(case, BASE, layout, dtype))


@cases
@compiled
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(case, backend, shape):
    if not fits(case, shape):
        with pytest.raises(ValueError, match="at least"):
            run(case, backend, *make(case, shape, "contiguous"))
        return
    for layout, dtype in itertools.product(layouts(case)[:4], (torch.float32, torch.bfloat16)):
        assert_as_good_as_eager(case, backend, make(case, shape, layout, dtype))


@compiled
@pytest.mark.parametrize("pool", (1, 3, 5))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_pools(backend, pool, layout):
    """Windows that do not cut the plane evenly, and those that threads share."""
    case = dataclasses.replace(NAMED["frame_difference"], call=lambda x, t: tempops.frame_difference(x, 5, pool))
    assert_as_good_as_eager(case, backend, make(case, Shape(1, 2, 15, 17, 16), layout, torch.float32))


@compiled
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_many_frames(backend, dtype):
    """channel_motion_gate of more frames than it makes the products of by itself."""
    case = NAMED["channel_motion_gate"]
    assert_as_good_as_eager(case, backend, make(case, Shape(5, 8, 50, 1, 1), layouts(case)[0], dtype))


@compiled
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_deep_products(backend, layout):
    """shift_conv1x1 of more channels than it sums up in one go: bias and ReLU come with the last of them."""
    case = dataclasses.replace(
        NAMED["shift_conv1x1-relu"], others=lambda s, make: (make(s.C // 4, s.C, 1, 1), make(s.C // 4))
    )
    assert_as_good_as_eager(case, backend, make(case, Shape(1, 3, 300, 5, 7), layout, torch.float32))


@compiled
@pytest.mark.parametrize("fold_div, mode", ((1, "causal"), (2, "bidirectional")))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_channels_that_all_move(backend, fold_div, mode, dtype):
    case = dataclasses.replace(
        NAMED["shift_conv1x1"], call=lambda x, t, w: tempops.shift_conv1x1(x, w, None, t, fold_div, mode)
    )
    for layout in layouts(case):
        assert_as_good_as_eager(case, backend, make(case, BASE, layout, dtype))


@cases
@compiled
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_shape(case, backend, data):
    sizes = (st.integers(1, 3), st.integers(case.least_frames, 6), st.integers(1, 70), st.integers(1, 19),
             st.integers(1, 19))  # fmt: skip
    shape = Shape(*(data.draw(size) for size in sizes))
    layout = data.draw(st.sampled_from(layouts(case)))
    dtype = data.draw(st.sampled_from(DTYPES))
    assert_as_good_as_eager(case, backend, make(case, shape, layout, dtype))


@entries
@pytest.mark.parametrize("backend", ("eager", *COMPILED))
def test_derivatives(case, backend):
    """First and second derivatives against finite differences, with random output gradients."""
    names = [name for name in layouts(case) if name in ("contiguous", "channels_last", "five", "slice")]
    for layout in names[1:2] if INTERPRETED else names:
        x, n_segment, *others = make(case, TINY, layout)
        fast = backend != "cpu" or layout != "contiguous"
        with tempops.backend(backend):

            def call(x, *others, n_segment=n_segment):
                return case.call(x, n_segment, *others)

            assert torch.autograd.gradcheck(call, (x, *others), fast_mode=fast)
            assert torch.autograd.gradgradcheck(call, (x, *others), fast_mode=fast)


@cases
@compiled
def test_double_backward_is_that_of_eager(case, backend):
    for layout in layouts(case)[: 2 if INTERPRETED else 4]:
        x, n_segment, *others = make(case, SMALL, layout)
        inputs, results = (x, *others), []
        for name in (backend, "eager"):
            torch.manual_seed(0)
            with tempops.backend(name):
                outs = as_tuple(case.call(x, n_segment, *others))
            grads = [random_like(out).requires_grad_() for out in outs]
            dins = torch.autograd.grad(outs, inputs, grads, create_graph=True)
            ddins = [random_like(d) for d in inputs]
            second = torch.autograd.grad(dins, (*inputs, *grads), ddins, allow_unused=True, materialize_grads=True)
            results.append((*outs, *dins, *second))
        for mine, eager in zip(*results):
            torch.testing.assert_close(mine, eager, rtol=1e-9, atol=1e-9)


class Recorder(TorchDispatchMode):
    """Keeps the calls into torch.ops.tempops or tempops_triton that pass the dispatcher."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("tempops"):
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    @property
    def names(self):
        return {func._schema.name.split("::")[1] for func, _ in self.calls}


def recorded(case: Case, backend: str, layout: str, shape: Shape = SMALL, dtype: torch.dtype = torch.float64) -> list:
    """Every call that a case makes without a gradient, and forward, backward and double backward with one."""
    x, n_segment, *others = make(case, shape, layout, dtype)
    with Recorder() as recorder, tempops.backend(backend):
        with torch.no_grad():
            case.call(x, n_segment, *others)
        outs = as_tuple(case.call(x, n_segment, *others))
        dins = torch.autograd.grad(outs, (x, *others), [random_like(o) for o in outs], create_graph=True)
        dins = [d for d in dins if d.requires_grad]
        if dins:
            torch.autograd.grad(dins, (x, *others), [random_like(d) for d in dins], allow_unused=True)
    return recorder.calls


def detached(args):
    return tuple(a.detach().requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a for a in args)


@entries
@compiled
@pytest.mark.parametrize("shape", (TINY, SMALL._replace(N=0), Shape(1, 3, 8, 1, 1)), ids=str)
def test_opcheck(case, backend, shape):
    """Schema, fake tensors (shapes and strides) and autograd of every entry that a case reaches, in every layout."""
    for layout in layouts(case)[: 3 if INTERPRETED else None]:
        if shape.N == 0 and "slice" in layout:
            continue  # PyTorch's checks cannot clone an empty tensor with gaps
        seen = set()
        for func, args in recorded(case, backend, layout, shape, torch.float32):
            if func not in seen:
                seen.add(func)
                tests = ("test_faketensor", "test_autograd_registration")
                if shape.N:  # PyTorch's own schema check cannot clone an empty tensor that is not contiguous
                    tests += ("test_schema",)
                if layout in ("contiguous", "channels_last") and shape is TINY:
                    tests += ("test_aot_dispatch_dynamic",)
                torch.library.opcheck(func, detached(args), test_utils=tests)


def test_every_entry_differentiates():
    """An entry without an autograd rule passes opcheck and silently returns no gradient."""
    entries = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("tempops::")}
    entries -= {"temporal_shift_"}  # raises instead: test_inplace.py
    reached = set()
    for case in CASES:
        for func, args in recorded(case, "cpu", layouts(case)[0]):
            reached.add(func._schema.name.split("::")[1])
            out = func(*detached(args))
            assert any(o.requires_grad for o in as_tuple(out)), func
    assert reached == entries, "an entry that no case reaches is an entry that no test checks"


@cases
@compiled
def test_native_layouts_are_kept_without_a_copy(case, backend):
    if case.matmul:
        pytest.skip("matrix products may lay their operands out anew")
    for layout in [name for name in layouts(case) if name in NATIVE]:
        x, n_segment, *others = make(case, BASE, layout, torch.float32)
        with tempops.backend(backend), torch.profiler.profile() as profile:
            outs = as_tuple(case.call(x, n_segment, *others))
            names = {event.name for event in profile.events() or ()}
        with torch.profiler.profile() as profile:
            torch.autograd.grad(outs, x, [torch.randn_like(o) for o in outs])
        names |= {event.name for event in profile.events()}
        assert not names & {"aten::contiguous", "aten::clone", "aten::_to_copy"}, layout
        if "channels_last" in layout:
            expected = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
            assert all(out.is_contiguous(memory_format=expected) for out in outs), layout
        else:
            assert all(out.is_contiguous() for out in outs), layout


@cases
@compiled
def test_memory_is_the_outputs(case, backend):
    """No temporary is larger than 1 MB beside the results."""
    if case.matmul:
        pytest.skip("matrix products are PyTorch's, with PyTorch's workspaces")
    x, n_segment, *others = make(case, Shape(1, 8, 64, 56, 56), layouts(case)[0], torch.float32)

    def extra(call, expected):
        if x.is_cuda:
            before = torch.cuda.memory_stats()["requested_bytes.all.current"]
            torch.cuda.reset_peak_memory_stats()
            results = call()
            allocated = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
        else:
            with torch.profiler.profile(profile_memory=True) as profile:
                results = call()
            sizes = [e.cpu_memory_usage for e in profile.events() if e.cpu_memory_usage > 0 and not e.cpu_children]
            allocated = sum(sizes)
        del results
        return allocated - sum(t.numel() * t.element_size() for t in expected)

    with tempops.backend(backend):
        with torch.no_grad():
            outs = as_tuple(case.call(x, n_segment, *others))
            assert extra(lambda: case.call(x, n_segment, *others), outs) <= 1 << 20
        outs = as_tuple(case.call(x, n_segment, *others))
    grads = [torch.randn_like(out) for out in outs]
    inputs = (x, *others)
    assert extra(lambda: torch.autograd.grad(outs, inputs, grads, retain_graph=True), inputs) <= 1 << 20


@cases
@compiled
@pytest.mark.parametrize("shape", (Shape(2, 4, 64, 28, 28), Shape(1, 2, 520, 5, 5)), ids=str)
def test_deterministic_whatever_the_threads(case, backend, shape):
    for layout in layouts(case)[:2]:
        inputs = make(case, shape, layout, torch.float32)
        outs, dins, grads = run(case, backend, *inputs)
        before = torch.get_num_threads()
        try:
            for threads in (before, before) if case.matmul else (1, 2, 3):  # PyTorch's products follow the threads
                torch.set_num_threads(threads)
                again, dins_again, _ = run(case, backend, *inputs, grads=grads)
                assert all(torch.equal(a, b) for a, b in zip((*outs, *dins), (*again, *dins_again)))
        finally:
            torch.set_num_threads(before)


@cases
@pytest.mark.parametrize("backend", ("eager", *COMPILED))
@pytest.mark.parametrize("value", (torch.nan, torch.inf), ids=("nan", "inf"))
def test_a_bad_frame_reaches_only_its_readers(case, backend, value):
    """One frame of NaN or Inf in the first clip: the second clip and the frames out of reach stay as they were."""
    shape = Shape(2, 7, 8, 3, 3)
    for layout in layouts(case)[:2]:
        x, n_segment, *others = make(case, shape, layout)
        grads = None
        results = []
        for bad in (False, True):
            xs = x.detach().clone(memory_format=torch.preserve_format)
            if bad:
                xs[0] = value
            (outs, (dx, *_), grads) = run(case, backend, xs.requires_grad_(), n_segment, *others, grads=grads)
            results.append([*(o.detach() for o in outs), dx])
        for clean, dirty in zip(*results):
            if case.reach is None:
                clean, dirty = clean[clean.size(0) // 2 :], dirty[dirty.size(0) // 2 :]
            else:
                clean, dirty = clean[case.reach + 1 :], dirty[case.reach + 1 :]
            assert torch.equal(clean, dirty), layout


@compiled
@pytest.mark.parametrize("kernel_size", (3, 5, 7))
@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("channels", (3, 520))
def test_maxima_are_those_of_max_pool2d(backend, kernel_size, channels_last, channels):
    """Ties, NaN and infinities: the gradient, and what is gathered for the gradient's gradient, follow one element."""
    x = torch.randint(0, 3, (3, channels, 5, 6)).double()
    x[torch.rand(x.shape) < 0.1] = -torch.inf
    x[:2][torch.rand(2, channels, 5, 6) < 0.03] = torch.nan
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format).requires_grad_()
    dy, ddx = torch.randn(2, channels, 5, 6, dtype=x.dtype, requires_grad=True), torch.randn_like(x)
    results = []
    for name in (backend, "eager"):
        with tempops.backend(name):
            y = tempops.motion_enhance(x, 3, kernel_size)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        results.append((y, dx, *torch.autograd.grad(dx, dy, ddx)))
    for mine, eager in zip(*results):
        torch.testing.assert_close(mine, eager, equal_nan=True)


@cases
@compiled
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_strides_of_single_frames(case, backend, dtype):
    """The stride of a dimension of size 1 says nothing, not even that what lies a frame away is aligned."""
    if case.least_frames > 1 or 4 not in case.ranks:
        pytest.skip("takes no single frames of four dimensions")
    x, n_segment, *others = make(case, Shape(1, 1, 64, 4, 4), "contiguous", dtype)
    odd = x.detach().as_strided(x.shape, (1, *x.stride()[1:])).requires_grad_()
    outs, dins, grads = run(case, backend, x, n_segment, *others)
    odd_outs, odd_dins, _ = run(case, backend, odd, n_segment, *others, grads=grads)
    for plain, mine in zip((*outs, *dins), (*odd_outs, *odd_dins)):
        assert torch.equal(plain, mine)


@compiled
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_squares_that_overflow(backend, layout):
    """A pixel whose norm is infinite is like no other, and has no gradient, as in eager."""
    x, n_segment = make(NAMED["temporal_cosine_similarity"], Shape(1, 4, 20, 3, 5), layout, torch.float32)
    with torch.no_grad():
        x[1, 7, 1, 2] = 1e20
    grads = [torch.randn(4, 1, 3, 5, device=x.device)]
    results = [run(NAMED["temporal_cosine_similarity"], name, x, n_segment, grads=grads) for name in (backend, "eager")]
    for mine, eager in zip(*([*outs, *dins] for outs, dins, _ in results)):
        torch.testing.assert_close(mine, eager)
    with tempops.backend(backend):
        assert torch.equal(tempops.cosine_gate(x, n_segment)[0, :, 1, 2], x[0, :, 1, 2])


@cases
@compiled
def test_expanded_gradients(case, backend):
    x, n_segment, *others = make(case, BASE, layouts(case)[0])
    with tempops.backend(backend):
        sum(out.sum() for out in as_tuple(case.call(x, n_segment, *others))).backward()
    got, x.grad = x.grad, None
    with tempops.backend("eager"):
        sum(out.sum() for out in as_tuple(case.call(x, n_segment, *others))).backward()
    torch.testing.assert_close(got, x.grad)


@cases
@compiled
def test_gradients_in_another_layout(case, backend):
    """A contiguous gradient of a channels_last output, the reverse, and one with strides of its own."""
    for layout in [name for name in layouts(case) if name in ("contiguous", "channels_last", "five_channels_last")]:
        inputs = make(case, BASE, layout)
        _, dins, grads = run(case, backend, *inputs)
        for other in (lambda g: g.contiguous(), lambda g: g.transpose(-1, -3).contiguous().transpose(-1, -3)):
            _, again, _ = run(case, backend, *inputs, grads=[other(g) if g.dim() > 2 else g for g in grads])
            assert all(torch.equal(a, b) for a, b in zip(dins, again))


@cases
@compiled
def test_only_asked_for_gradients(case, backend):
    """Each input alone may require a gradient."""
    inputs = make(case, BASE, layouts(case)[0])
    full = run(case, backend, *inputs)
    tensors = [i for i, a in enumerate(inputs) if isinstance(a, torch.Tensor)]
    for place, i in enumerate(tensors):
        alone = [a.detach().requires_grad_(j == i) if isinstance(a, torch.Tensor) else a for j, a in enumerate(inputs)]
        with tempops.backend(backend):
            outs = as_tuple(case.call(*alone))
        (grad,) = torch.autograd.grad(outs, alone[i], full[2])
        torch.testing.assert_close(grad, full[1][place], rtol=1e-12, atol=1e-12)


@cases
@compiled
def test_the_forward_chooses_the_back_end_of_every_derivative(case, backend):
    x, n_segment, *others = make(case, SMALL, layouts(case)[0])
    for chosen, elsewhere in ((backend, "eager"), ("eager", backend)):
        with tempops.backend(chosen):
            outs = as_tuple(case.call(x, n_segment, *others))
        with Recorder() as recorder, tempops.backend(elsewhere):
            torch.autograd.grad(outs, (x, *others), [random_like(o) for o in outs], create_graph=True)
        assert bool(recorder.calls) == (chosen == backend)


@cases
def test_transforms(case):
    """Forward-mode derivatives and torch.func: no tangent is lost, whatever back end would run."""
    x, n_segment, *others = make(case, SMALL, layouts(case)[0])
    others = [other.detach() for other in others]

    def call(x):
        return as_tuple(case.call(x, n_segment, *others))

    x, direction = x.detach(), torch.randn_like(x)
    with tempops.backend("eager"):
        expected = torch.autograd.functional.jvp(call, x, direction)[1]
    tangents = torch.func.jvp(call, (x,), (direction,))[1]
    with torch.autograd.forward_ad.dual_level():
        dual = call(torch.autograd.forward_ad.make_dual(x, direction))
        tangents += tuple(torch.autograd.forward_ad.unpack_dual(out).tangent for out in dual)
    torch.testing.assert_close(tangents, (*expected, *expected))

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: torch.func.jvp(call, (x,), (direction,))[1], backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)

    for one, both in zip(call(x), torch.vmap(call)(torch.stack([direction, x]))):
        torch.testing.assert_close(both[1], one)
    gradient = torch.func.grad(lambda x: sum(out.square().sum() for out in call(x)))(x)
    x.requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(sum(out.square().sum() for out in call(x)), x)[0])


@cases
@compiled
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_compile(case, backend, layout):
    if layout not in layouts(case):
        pytest.skip(f"{case} takes no {layout} input")
    torch._dynamo.reset()
    x, n_segment, *others = make(case, BASE, layout, torch.float32)
    expected, dexpected, grads = run(case, backend, x, n_segment, *others)
    call = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    with tempops.backend(backend):
        outs = as_tuple(call(x, n_segment, *others))
    dins = torch.autograd.grad(outs, (x, *others), grads)
    for mine, plain in zip((*outs, *dins), (*expected, *dexpected)):
        assert torch.equal(mine, plain) and mine.stride() == plain.stride()


@cases
@compiled
def test_direct_calls_have_the_gradient_of_eager(case, backend):
    """Entries of torch.ops, of which the public function may call another one where a gradient is recorded."""
    torch.manual_seed(0)
    entry, arguments = recorded(case, backend, layouts(case)[0])[0]
    arguments = detached(arguments)
    torch.manual_seed(0)
    x, n_segment, *others = make(case, SMALL, layouts(case)[0])
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    outs = as_tuple(entry(*arguments))
    grads = [random_like(out) for out in outs]
    with tempops.backend("eager"):
        expected = torch.autograd.grad(as_tuple(case.call(x, n_segment, *others)), (x, *others), grads)
    for mine, eager in zip(torch.autograd.grad(outs, tensors, grads), expected, strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-9, atol=1e-9)


@cases
@compiled
def test_autocast(case, backend):
    """The other floating arguments follow x; what behaves as conv2d follows autocast."""
    x, n_segment, *others = make(case, BASE, layouts(case)[0], torch.float32)
    with tempops.backend(backend), torch.autocast(x.device.type, torch.bfloat16):
        out = as_tuple(case.call(x, n_segment, *others))[0]
        assert out.dtype == (torch.bfloat16 if case.autocasts else torch.float32)
        low = as_tuple(case.call(x.bfloat16(), n_segment, *others))[0]
        assert low.dtype == torch.bfloat16
        grads = torch.autograd.grad(low.float().sum(), (x, *others), allow_unused=True)
    assert all(g is None or g.dtype == torch.float32 for g in grads)


@compiled
# The products of many frames and with large weights are PyTorch's.
@pytest.mark.parametrize("shape", (Shape(1, 2, 16, 2, 2), Shape(5, 8, 1040, 1, 1)), ids=str)
def test_direct_calls_ignore_autocast(backend, shape):
    """Entries of torch.ops answer in the dtype of their arguments, whatever their kernels call."""
    entries = torch.ops.tempops_triton if backend == "triton" else torch.ops.tempops
    calls = {
        "channel_motion_gate": lambda x, t, *weights: entries.channel_motion_gate(x, *weights, t),
        "shift_conv1x1": lambda x, t, weight: entries.shift_conv1x1(x, weight, None, t),
    }
    for name, call in calls.items():
        x, t, *others = make(NAMED[name], shape, layouts(NAMED[name])[0], torch.float32)
        arguments = [a.detach().requires_grad_() for a in (x, *others)]
        results = []
        for enabled in (False, True):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=enabled):
                out = call(arguments[0], t, *arguments[1:])
                results.append((out, *torch.autograd.grad(out.square().sum(), arguments)))
        for plain, mixed in zip(*results):
            assert torch.equal(plain, mixed), name


@cases
def test_meta_and_fake(case):
    x, n_segment, *others = make(case, BASE, layouts(case)[0], torch.float32)
    real = as_tuple(case.call(x, n_segment, *others))
    meta = as_tuple(case.call(x.to("meta"), n_segment, *(o.to("meta") for o in others)))
    assert [(m.shape, m.stride(), m.dtype) for m in meta] == [(r.shape, r.stride(), r.dtype) for r in real]


@compiled
def test_memory_is_flat(backend):
    """1,000 forward and backward passes of every op leave the process as large as 100 did, and the GPU's memory too.

    In Triton's interpreter five, of which no tensor is left.
    """
    inputs = [(case, make(case, SMALL, layouts(case)[0], torch.float32)) for case in CASES if case.benchmark]
    inputs = [(case, i) for case, i in inputs if why_not(backend, case.op, i[0].device.type) is None]

    def passes(count: int) -> tuple[int, int, int]:
        for _ in range(count):
            for case, (x, n_segment, *others) in inputs:
                with tempops.backend(backend):
                    out = as_tuple(case.call(x, n_segment, *others))[0]
                torch.autograd.grad(out.sum(), x)
        gc.collect()
        with open("/proc/self/statm") as statm:
            process = int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        return process, torch.cuda.memory_allocated() if torch.cuda.is_available() else 0, tensors

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc to know the size of the process")
    before, *others_before = passes(1 if INTERPRETED else 100)
    after, *others_after = passes(4 if INTERPRETED else 900)
    assert inputs and after - before < 4 << 20
    assert all(a <= b for a, b in zip(others_after, others_before))  # less where earlier tests' garbage went


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="other processors have the baseline alone")
@pytest.mark.parametrize(
    "variables",
    (
        {"ATEN_CPU_CAPABILITY": "default"},
        {"ATEN_CPU_CAPABILITY": "avx2"},
        {"ATEN_CPU_CAPABILITY": "default", "TEMPOPS_CACHE_BYTES": "0"},
        {"TEMPOPS_CACHE_BYTES": "0"},
    ),
    ids=("baseline", "avx2", "baseline-past the caches", "past the caches"),
)
def test_instructions(variables):
    """The same checks in processes that hide wider instructions, and that write outputs of any size past the caches."""
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, tempops, tempops._C\n"
        "from cases import CASES\n"
        "from inputs import BASE, SHAPES, fits, layouts, make\n"
        "from test_ops import assert_as_good_as_eager\n"
        "limit = os.environ.get('ATEN_CPU_CAPABILITY', '').replace('default', 'baseline')\n"
        "assert limit in ('', tempops._C.instruction_set()), limit\n"
        "torch.manual_seed(0)\n"
        "for case in CASES:\n"
        "    for layout in layouts(case)[:2]:\n"
        "        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):\n"
        "            for shape in filter(lambda shape: fits(case, shape), (BASE, *SHAPES[5:7])):\n"
        "                assert_as_good_as_eager(case, 'cpu', make(case, shape, layout, dtype))\n"
    )
    subprocess.run([sys.executable, "-c", program, os.path.dirname(__file__)], check=True, env=os.environ | variables)
