"""What every op needs: argument checks, the layout rule, and `Op`, which ties one op's parts together."""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Shape(NamedTuple):
    """The sizes of a tensor of clips, whatever its rank."""

    N: int
    T: int
    C: int
    H: int
    W: int


# --- argument checks: one sentence each, naming the argument, what was expected and what came -------------------------


def check_tensor(name: str, x: object, like: Tensor | None = None) -> None:
    """Raises unless `x` is a dense floating-point tensor, of the dtype and device of `like` where that is given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {x.layout}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if like is not None and x.dtype != like.dtype:
        raise TypeError(f"{name} must have x's dtype {like.dtype}, got {x.dtype}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} must be on x's device {like.device}, got {x.device}")


def check_shape(name: str, x: Tensor, *allowed: tuple[int, ...]) -> None:
    """Raises unless x's shape is one of `allowed`."""
    for shape in allowed:
        if x.shape == shape:
            return
    expected = " or ".join(str([int(size) for size in shape]) for shape in allowed)
    raise ValueError(f"{name} must have shape {expected}, got {list(x.shape)}")


def check_int(name: str, value: object, least: int | None = None) -> None:
    """Raises unless `value` is an integer, not below `least` where that is given."""
    if type(value) is not int:  # the others take longer to recognise
        if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if not isinstance(value, torch.SymInt) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit 64 bits, got {value}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_clips(x: object, n_segment: object, *, name: str = "x", least_frames: int = 1) -> Shape:
    """Checks a tensor of clips (SPEC section 1) and returns its sizes."""
    check_tensor(name, x)
    shape = x.shape
    if len(shape) not in (4, 5):
        raise ValueError(f"{name} must be [N*T, C, H, W] or [N, C, T, H, W], got {len(shape)}-D {list(shape)}")
    if len(shape) == 5:
        if n_segment is not None:
            raise ValueError(f"n_segment must be None for a 5-D {name} [N, C, T, H, W], got {n_segment}")
        n, c, t, h, w = shape
    else:
        if n_segment is None:
            raise ValueError(f"n_segment is required for a 4-D {name} [N*T, C, H, W]")
        check_int("n_segment", n_segment, least=1)
        frames, c, h, w = shape
        if frames % n_segment != 0:
            raise ValueError(f"n_segment={n_segment} does not divide {frames} frames")
        n, t = frames // n_segment, n_segment
    if t < least_frames:
        frames = "frame" if least_frames == 1 else "frames"
        raise ValueError(f"{name} must have at least {least_frames} {frames} a clip, got T = {t}")
    return Shape(n, t, c, h, w)


# --- layout: the rule that csrc/common.h follows too ------------------------------------------------------------------


def is_channels_last(x: Tensor) -> bool:
    """Whether x's strides say channels_last, by PyTorch's own rule; slices count as what they are slices of."""
    least = 0
    if x.stride(1) == 0:
        return False
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.size(d) == 0 or x.stride(d) < least:
            return False
        if d == 0 and least == x.stride(1):
            return False
        least = x.stride(d) * max(x.size(d), 1)
    return True


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format in which an op answers x."""
    if not is_channels_last(x):
        return torch.contiguous_format
    return torch.channels_last_3d if x.dim() == 5 else torch.channels_last


def empty_clips(x: Tensor, n_segment: int | None, **sizes: int) -> Tensor:
    """An uninitialised tensor of clips like x, in x's layout, with the named sizes (T, C, H, W) replaced."""
    shape = clip_shape(x, n_segment)._replace(**sizes)
    n, t, c, h, w = shape
    size = (n, c, t, h, w) if x.dim() == 5 else (n * t, c, h, w)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def clip_shape(x: Tensor, n_segment: int | None) -> Shape:
    """The sizes of a tensor of clips that was checked before."""
    if x.dim() == 5:
        n, c, t, h, w = x.shape
    else:
        (frames, c, h, w), t = x.shape, n_segment
        n = frames // t
    return Shape(n, t, c, h, w)


# --- for the eager references -----------------------------------------------------------------------------------------


def to_clips(x: Tensor, n_segment: int | None) -> Tensor:
    """x as a view [N, T, C, H, W], whatever its rank."""
    if x.dim() == 5:
        return x.transpose(1, 2)
    return x.unflatten(0, (x.size(0) // n_segment, n_segment))


def from_clips(y: Tensor, x: Tensor) -> Tensor:
    """The inverse of `to_clips`: y [N, T, C, H, W] in the rank of x."""
    return y.transpose(1, 2) if x.dim() == 5 else y.flatten(0, 1)


def accumulate_wide(reference: Callable) -> Callable:
    """Makes a reference compute float16 and bfloat16 in float32 and round once, as SPEC section 1 asks."""

    @functools.wraps(reference)
    def wide(x: Tensor, *args):
        if x.dtype not in (torch.float16, torch.bfloat16):
            return reference(x, *args)
        args = [a.float() if isinstance(a, Tensor) else a for a in args]
        out = reference(x.float(), *args)
        return tuple(o.to(x.dtype) for o in out) if isinstance(out, tuple) else out.to(x.dtype)

    return wide


# --- one op -----------------------------------------------------------------------------------------------------------


class Op:
    """One op: argument checks, the eager reference, and `torch.ops` entries with their fakes and derivatives.

    `check` raises ValueError or TypeError and gets the arguments of the public function, in order. `reference` is plain
    PyTorch, differentiated by PyTorch. The compiled back ends are entries of the same name in a `torch.ops` namespace;
    `register` gives each entry its fake and its derivative, so that direct callers have them too. Where a gradient is
    recorded the entry `recorded` may run instead: its first result is the op's, the others spare the backward work.
    """

    def __init__(
        self, name: str, *, check: Callable, reference: Callable, autocast: str = "input", recorded: str | None = None
    ) -> None:
        self.name, self.check, self.reference, self.autocast = name, check, reference, autocast
        self.recorded = recorded

    def __call__(self, x: Tensor, *args):
        device = _device_type(x)
        if _autocasts(device):
            dtype = torch.get_autocast_dtype(device) if self.autocast == "compute" else getattr(x, "dtype", None)
            with torch.autocast(device, enabled=False):
                return self(*(_cast(a, dtype) for a in (x, *args)))
        self.check(x, *args)
        namespace = None if is_transformed() else _backend.namespace(device, self.name)
        if namespace is None:
            return self.reference(x, *args)
        entries = getattr(torch.ops, namespace)
        needs_gradient = torch.is_grad_enabled() and _requires_grad(x, *args)
        if needs_gradient and self.recorded is not None:
            return getattr(entries, self.recorded).default(x, *args)[0]
        entry = getattr(entries, self.name).default
        if needs_gradient or torch.compiler.is_compiling():
            return entry(x, *args)
        # The derivative of an entry is registered in Python: to pass through it takes as long as the rest of a call.
        with torch._C._AutoDispatchBelowAutograd():
            return entry(x, *args)


def _device_type(x: object) -> str:
    """The type of x's device: the usual two by flags, as spelling out a device takes longer."""
    if not isinstance(x, Tensor):
        return "cpu"
    return "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type


@torch.compiler.assume_constant_result  # torch.compile guards on it, and enters the transforms while it traces
def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work: entries have no rules for them."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def _requires_grad(*args) -> bool:
    for arg in args:
        if isinstance(arg, Tensor) and arg.requires_grad:
            return True
    return False


def _autocasts(device: str) -> bool:
    return device in ("cpu", "cuda", "mps", "xpu") and torch.is_autocast_enabled(device)


def _cast(value: object, dtype: torch.dtype | None) -> object:
    floating = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if floating and dtype in DTYPES else value


def register(
    name: str,
    fake: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    check: Callable | None = None,
) -> None:
    """Gives the entry `name` of torch.ops.tempops its fake and, with `backward`, its derivative.

    `backward(ops, ctx, *grads)` gets the namespace that ran the forward, so that one back end runs every order.
    `check` is run on fake tensors first, so that tracing bad input fails as running it would.
    Other namespaces that have the entry get the same by `register_in`.
    """

    def give(namespace: str) -> None:
        entry = f"{namespace}::{name}"
        torch.library.register_fake(entry, checked(name, fake))
        _keep_autocast_out(namespace, name)
        if backward is not None:
            formula = functools.partial(_without_autocast, functools.partial(backward, getattr(torch.ops, namespace)))
            torch.library.register_autograd(entry, formula, setup_context=setup_context)

    _checks[name], _registrations[name] = check, give
    give("tempops")


def _keep_autocast_out(namespace: str, name: str) -> None:
    """Has direct callers of an entry get the dtype of their arguments under autocast, whatever the kernel calls."""
    entry = getattr(getattr(torch.ops, namespace), name).default
    library = torch.library.Library(namespace, "IMPL")

    def run(*args):
        with torch._C._DisableAutocast():
            return entry(*args)

    for device in ("CPU", "CUDA"):
        library.impl(name, run, f"Autocast{device}")
    _libraries.append(library)


def register_inplace(name: str, *, check: Callable) -> None:
    """Gives the entry `name`, which changes its first argument and returns nothing, what autograd must know of it.

    The argument's version is bumped, and a call that would need a gradient raises: entries of torch.ops with schema
    ``-> ()`` have none. The public function differentiates.
    """

    def give(namespace: str) -> None:
        torch.library.register_fake(f"{namespace}::{name}", checked(name, lambda *args: None))
        entry = getattr(getattr(torch.ops, namespace), name).default
        library = torch.library.Library(namespace, "IMPL")

        def no_gradient(keyset, x, *args):
            if torch.is_grad_enabled() and x.requires_grad:
                raise RuntimeError(f"torch.ops.{entry.name().replace('::', '.')} has no gradient; call tempops.{name}")
            with torch._C._AutoDispatchBelowAutograd():
                entry.redispatch(keyset & torch._C._after_autograd_keyset, x, *args)

        def bump_version(keyset, x, *args):
            torch.autograd.graph.increment_version(x)
            with torch._C._AutoDispatchBelowADInplaceOrView():
                entry.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, x, *args)

        library.impl(name, no_gradient, "Autograd", with_keyset=True)
        library.impl(name, bump_version, "ADInplaceOrView", with_keyset=True)
        _libraries.append(library)

    _checks[name], _registrations[name] = check, give
    give("tempops")


def register_in(namespace: str, name: str) -> None:
    """Gives the entry `name` of another namespace what the one of torch.ops.tempops has."""
    _registrations[name](namespace)


_checks: dict[str, Callable | None] = {}
_registrations: dict[str, Callable[[str], None]] = {}
_libraries: list[torch.library.Library] = []  # a registration lasts as long as its Library


def needs(ctx, count: int) -> tuple[bool, ...]:
    """Which of an entry's `count` arguments need a gradient; the dispatcher leaves out trailing defaults."""
    return (*ctx.needs_input_grad, *[False] * (count - len(ctx.needs_input_grad)))


def checked(name: str, implementation: Callable) -> Callable:
    """The implementation of an entry behind the check of its arguments, with all of them given."""
    defaults = [a.default_value for a in getattr(torch.ops.tempops, name).default._schema.arguments]

    @functools.wraps(implementation)
    def wrapper(*args):
        args = (*args, *defaults[len(args) :])  # the dispatcher leaves out arguments that equal their default
        try:
            if _checks[name] is not None:
                _checks[name](*args)
        except (TypeError, ValueError) as error:
            raise RuntimeError(str(error)) from None
        return implementation(*args)

    return wrapper


def _without_autocast(formula: Callable, ctx, *grads):
    """Gradients are computed in the dtypes of the forward, wherever backward() is called."""
    device = next((grad.device.type for grad in grads if grad is not None), "cpu")
    if _autocasts(device):
        with torch.autocast(device, enabled=False):
            return formula(ctx, *grads)
    return formula(ctx, *grads)
