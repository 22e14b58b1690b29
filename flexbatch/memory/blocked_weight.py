"""Weights in oneDNN's blocked memory format, over memory of ours: stored, streamed and multiplied as they lie.

torch's products hand a plain matrix to oneDNN, which lays it out anew inside every one of them: a tenth of the time for
a hundred rows, a third and more for sixteen (docs/benchmarks.md). A weight that lies in its format already is used as
it is, with the same numbers as result, bit for bit (torch 2.13; where 2.11 multiplies on AMX, one in some thousand
numbers differs in its last bit for some numbers of rows).

torch keeps such a weight in an opaque tensor. To get at its bytes and to make one over given bytes there is the C
interface that models compiled ahead of time are linked against (torch/csrc/inductor/aoti_torch/c/shim.h). Which format
oneDNN likes depends on the processor and on its version; `BlockedForm.key` tells forms apart.
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

ROWS = 256
"""Rows of a product that the format is asked for; oneDNN's choice has been the same for 1 to 2,048."""
ZERO_POINT = 128
"""Of the activations that 8-bit weights are laid out for: oneDNN's products of unsigned by signed integers are its fast
ones, and the format has each column's sum beside it."""


@dataclass(frozen=True, slots=True)
class BlockedForm:
    """How oneDNN wants a weight of a type to lie on this machine: `nbytes` in all, described for torch by `descriptor`
    (a serialised memory descriptor). `shape` is the opaque tensor's: `[out, in]`, int8 `[in, out]`."""

    shape: tuple[int, int]
    dtype: torch.dtype
    nbytes: int
    descriptor: bytes

    @property
    def key(self) -> str:
        """The same for the same arrangement of bytes."""
        return hashlib.sha256(self.descriptor).hexdigest()[:16]

    def over(self, memory: torch.Tensor) -> torch.Tensor:
        """The opaque tensor over `memory` (contiguous, at least `nbytes` bytes), which must outlive it."""
        handle = ctypes.c_void_p()
        sizes, strides = (ctypes.c_int64 * 2)(*self.shape), (ctypes.c_int64 * 2)(self.shape[1], 1)
        _checked(
            _torch().aoti_torch_create_tensor_from_blob_v2(
                ctypes.c_void_p(memory.data_ptr()),
                ctypes.c_int64(2),
                sizes,
                strides,
                ctypes.c_int64(0),
                ctypes.c_int32(_constant(f"dtype_{str(self.dtype).removeprefix('torch.')}")),
                ctypes.c_int32(_constant("device_type_cpu")),
                ctypes.c_int32(0),
                ctypes.byref(handle),
                ctypes.c_int32(_constant("layout__mkldnn")),
                self.descriptor,
                ctypes.c_int64(len(self.descriptor)),
            )
        )
        assert handle.value is not None
        # The one that takes a list: the other keeps a reference of its own (torch 2.13), so nothing is ever freed.
        (tensor,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(handle.value)])
        return tensor


@dataclass(frozen=True, slots=True)
class BlockedLayout:
    """How a weight `[out, in]` is kept in bfloat16 in the blocked format, uint8 `[bytes]`. `form` is its key."""

    shape: tuple[int, ...]
    form: str

    @property
    def together(self) -> int:
        """So many trailing dimensions are packed together."""
        return 2

    @property
    def nbytes(self) -> int:
        return self._form.nbytes

    @property
    def parts(self) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
        """Name, dtype and shape of each stored tensor."""
        return (("blocked", torch.uint8, (self.nbytes,)),)

    def pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The `parts` of a weight of this shape."""
        return (blocked_bytes(lay_out(tensor.to(torch.bfloat16))),)

    def weight(self, stored: torch.Tensor) -> torch.Tensor:
        """The weight for `linear` over its stored bytes, which must outlive it."""
        return self._form.over(stored)

    @property
    def _form(self) -> BlockedForm:
        return blocked_form(self.shape, torch.bfloat16)


def blocked_layout(shape: tuple[int, ...]) -> BlockedLayout:
    """The layout of a weight `[out, in]` on this machine, which must suit bfloat16."""
    return BlockedLayout(shape, blocked_form(shape, torch.bfloat16).key)


def lay_out(weight: torch.Tensor) -> torch.Tensor:
    """The weight `[out, in]`, bfloat16 or int8, as an opaque tensor in the format that its products like best."""
    laid_out: torch.Tensor
    if weight.dtype == torch.int8:
        laid_out = torch.ops.onednn.qlinear_prepack(weight, [ROWS, weight.shape[1]])
    else:
        laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return laid_out


@lru_cache(maxsize=64)
def blocked_form(shape: tuple[int, ...], dtype: torch.dtype) -> BlockedForm:
    """The form of a weight `[out, in]` of this shape: one of zeros is laid out and thrown away."""
    laid_out = lay_out(torch.zeros(shape, dtype=dtype))
    descriptor = torch.ops.mkldnn._get_mkldnn_serialized_md(laid_out)
    rows, columns = laid_out.shape
    return BlockedForm((rows, columns), dtype, torch.ops.mkldnn._nbytes(laid_out), descriptor.numpy().tobytes())


def blocked_bytes(laid_out: torch.Tensor) -> torch.Tensor:
    """The bytes of an opaque tensor, uint8 `[nbytes]`: its own memory, which lives as long as one of them."""
    (capsule,) = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([laid_out])
    handle = ctypes.c_void_p(_pointer(capsule))
    address = ctypes.c_void_p()
    try:
        _checked(_torch().aoti_torch_get_data_ptr(handle, ctypes.byref(address)))
    finally:
        _torch().aoti_torch_delete_tensor_object(handle)
    assert address.value is not None
    memory = (ctypes.c_uint8 * torch.ops.mkldnn._nbytes(laid_out)).from_address(address.value)
    memory.owner = laid_out
    return torch.frombuffer(memory, dtype=torch.uint8)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rectified: bool = False) -> torch.Tensor:
    """`x` `[..., in]` bfloat16 times an opaque or plain weight `[out, in]`, plus `bias` `[out]`, added in float32
    within the product: what `torch.nn.functional.linear` returns, without a second pass over the result. With
    `rectified`, what ReLU makes of it."""
    after = "relu" if rectified else "none"
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, after, [], "")
    return product


def integer_product(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`values` uint8 `[rows, in]`, each `ZERO_POINT` too large, times an opaque int8 weight: the exact sums, rounded to
    float32 `[rows, out]`."""
    sums: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
        values, 1.0, ZERO_POINT, weight, _ones(), _zeros(), None, 1.0, 0, torch.float32, "none", [], ""
    )
    return sums


@lru_cache(maxsize=2)
def suits(dtype: torch.dtype) -> bool:
    """Whether this machine and this torch have blocked weights of this type (bfloat16, int8), seen on a small one: laid
    out, carried through plain bytes, and multiplied with the right result, the largest numbers included."""
    if dtype not in (torch.bfloat16, torch.int8):
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    try:
        return _proven(dtype)
    except (AttributeError, RuntimeError, TypeError, OSError):
        return False


def _proven(dtype: torch.dtype) -> bool:
    shape, rows = (96, 160), 3
    if dtype == torch.int8:
        # A processor without VNNI adds two products in 16 bits, which these overflow.
        weight = torch.full(shape, 127, dtype=dtype)
        weight[::2] = -127
        values = torch.full((rows, shape[1]), ZERO_POINT + 127, dtype=torch.uint8)
        values[1] = ZERO_POINT - 127
        wanted = torch.mm(values.float() - ZERO_POINT, weight.float().t())
        multiply: Any = integer_product
    else:
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(shape, generator=generator).to(dtype)
        values = torch.randn(rows, shape[1], generator=generator).to(dtype)
        wanted = torch.nn.functional.linear(values, weight)
        multiply = lambda x, w: linear(x, w, None)  # noqa: E731
    form = blocked_form(shape, dtype)
    carried = blocked_bytes(lay_out(weight))
    return len(carried) == form.nbytes and torch.equal(multiply(values, form.over(carried)), wanted)


@lru_cache(maxsize=1)
def _ones() -> torch.Tensor:
    return torch.ones(1)


@lru_cache(maxsize=1)
def _zeros() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int8)


@lru_cache(maxsize=1)
def _torch() -> ctypes.PyDLL:
    """The library that has torch's C interface. What is called there takes a microsecond: Python's lock is kept, which
    reading threads would take meanwhile, and a matrix wait for it five times."""
    return ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


@lru_cache(maxsize=8)
def _constant(name: str) -> int:
    """What torch's C interface calls a type, a device or a layout."""
    number: int = getattr(_torch(), f"aoti_torch_{name}")()
    return number


def _checked(failed: int) -> None:
    if failed:
        raise RuntimeError("torch does not make a tensor in oneDNN's format over given memory")


def _capsule(pointer: int) -> Any:
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return make(pointer, None, None)


def _pointer(capsule: Any) -> int:
    read = ctypes.pythonapi.PyCapsule_GetPointer
    read.restype, read.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    address: int = read(capsule, None)
    return address
