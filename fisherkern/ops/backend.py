"""Which implementation an op runs: plain PyTorch, the Triton kernel or the extension.

`use_backend` sets the choice for a block of code, the environment variable
FISHERKERN_BACKEND for a process. "torch" and "triton" mean what they say; "cuda" takes
the extension where it serves and Triton elsewhere. "auto" is the same on a GPU for the calls
that proven.json has a row of, and PyTorch for all others. Triton is imported when a kernel is
about to run, never before.

PyTorch itself has two paths in some ops. A CPU wants tiles that stay in its caches, and skips
empty work. A GPU wants few launches, sums in a fixed order without atomics, and no read back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from fisherkern.errors import InputError, shown
from fisherkern.ops import proven

BACKENDS = ("auto", "torch", "triton", "cuda")
VARIABLE = "FISHERKERN_BACKEND"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# tf32 products, which the fp32 kernels are made of, begin with this compute capability.
_OLDEST_ARCHITECTURE = 80

_chosen: ContextVar[str] = ContextVar("fisherkern_backend", default="auto")
_gpu_paths: ContextVar[bool] = ContextVar("fisherkern_gpu_paths", default=False)


def on_gpu(tensor: Tensor) -> bool:
    """Whether an op of `tensor` takes the path made for a GPU."""
    return tensor.is_cuda or _gpu_paths.get()


@contextlib.contextmanager
def gpu_paths() -> Iterator[None]:
    """Take the paths made for a GPU on every device: to test and to count them without one.

    Meant for backend="torch": the extension's CPU code serves the CPU's paths alone.
    """
    token = _gpu_paths.set(True)
    try:
        yield
    finally:
        _gpu_paths.reset(token)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the block with `name`; "auto" leaves the choice in force as it is."""
    if name not in BACKENDS:
        raise InputError(f"backend: {shown(name)} is not one of {', '.join(BACKENDS)}")
    token = _chosen.set(_chosen.get() if name == "auto" else name)
    try:
        yield
    finally:
        _chosen.reset(token)


def backend() -> str:
    """Return the backend in force: the innermost `use_backend`'s, the environment's, or auto."""
    name = _chosen.get()
    if name != "auto":
        return name
    name = os.environ.get(VARIABLE) or "auto"
    if name not in BACKENDS:
        raise InputError(f"{VARIABLE}: {shown(name)} is not one of {', '.join(BACKENDS)}")
    return name


def use_triton(
    op: str, *tensors: Tensor | None, width: int | None = None, size: int | None = None
) -> bool:
    """Whether this call of `op` runs its Triton kernel.

    The first two tensors are the products' matrices; without `width` and `size`, in the letters of
    proven.json, they are h (N, D) and the items (V, D). Raises InputError where a kernel was asked
    for and cannot run: triton is not installed, a tensor is fp64, or a tensor is on the CPU
    outside the interpreter.
    """
    name = backend()
    given = [tensor for tensor in tensors if tensor is not None]
    if name == "torch" or any(tensor.numel() == 0 for tensor in given):
        return False
    # The interpreter is for checking kernels: on the CPU only an explicit choice takes it.
    # On a GPU nobody gets a kernel unasked that was only seen in interpreter and compiler.
    if name == "auto":
        if not given[0].is_cuda:
            return False
        first, second = given[:2]
        dtype = proven.dtype_name(first.dtype, second.dtype)
        width = first.shape[1] if width is None else width
        size = len(first) * len(second) if size is None else size
        if not proven.beats_torch(op, "triton", architecture(first.device), dtype, width, size):
            return False
    reason = _why_not(given)
    if reason is None:
        return True
    if name != "auto":
        raise InputError(f"backend: {shown(name)} cannot be used: {reason}")
    return False


@functools.cache
def architecture(device: torch.device) -> int:
    """Return a GPU's compute capability as one number: 90 is 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _why_not(tensors: list[Tensor]) -> str | None:
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in _DTYPES:
            return f"the kernels take fp32, fp16 and bf16, not {tensor.dtype}"
    if not _installed():
        return "triton is not installed"
    if all(tensor.is_cuda for tensor in tensors):
        if architecture(tensors[0].device) < _OLDEST_ARCHITECTURE:
            return "the kernels need compute capability 8.0"
        return None
    if all(tensor.device.type == "cpu" for tensor in tensors) and interpreted():
        return None
    return "the tensors are on the CPU, which takes TRITON_INTERPRET=1 set before the start"


@functools.cache
def _installed() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: fixed, as TRITON_INTERPRET is read once."""
    import triton

    return bool(triton.knobs.runtime.interpret)
