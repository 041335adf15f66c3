"""Kernels bound to their sizes. Importing this module needs Triton.

Triton binds a call's arguments by name, looks at each for what a kernel may be specialised on, and
looks the compiled kernel up by all of that: 60 to 110 us of a processor, where the launch takes 5.
What is looked at depends on sizes, types and the alignment of addresses. So a kernel with its sizes
is a value here, made once; for each alignment of addresses it goes through Triton the first time,
and from then on hands the compiled kernel its arguments.
"""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

ALIGNMENT = 16
"""Bytes. Triton specialises on addresses that are multiples; tensor descriptors need them."""
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
KNOWN = (3, 2) <= VERSION <= (3, 7)
"""Versions whose compiled kernels are called as below. Others launch everything through Triton."""
MOST_KINDS = 64
"""One kernel with its sizes remembers so many kinds of addresses."""

Layout = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""What a tensor descriptor says: shape, strides, and the block that is loaded at once."""


class Bound:
    """A kernel whose arguments are tensors, numbers that stay, numbers that change, and constants,
    in this order.

    ``layouts`` are those of the first tensors, which the kernel gets as tensor descriptors; one
    that is None is handed over as None. Numbers that change are integers that the kernel is not
    specialised on.
    """

    __slots__ = ("_kernel", "_grid", "_numbers", "_constants", "_options", "_layouts", "_tail", "_forms", "_descriptors")

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple[float, ...],
                 layouts: tuple[Layout | None, ...] = (), *, constants: dict[str, Any], **options: int) -> None:
        self._kernel, self._numbers, self._layouts = kernel, numbers, layouts
        self._grid = (*grid, 1, 1)[:3]
        self._constants, self._options = constants, options
        self._tail = tuple(constants.values()) if VERSION >= (3, 3) else ()
        self._forms: dict[Any, tuple[Any, ...]] = {}
        self._descriptors: list[dict[str, Any] | None] = []

    def __call__(self, tensors: tuple[Tensor | None, ...], changing: tuple[int, ...] = ()) -> None:
        """``changing``: the first may need 64 bits, the others have 32."""
        device = tensors[-1].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(tensors, changing, device)
        else:
            self._launch(tensors, changing, device)

    def _launch(self, tensors: tuple[Tensor | None, ...], changing: tuple[int, ...], device: int) -> None:
        count = len(self._layouts)
        addresses, together = [], 0
        for tensor in tensors[count:] if count else tensors:
            address = tensor.data_ptr()
            addresses.append(address)
            together |= address
        aligned = () if not together % ALIGNMENT else tuple([not address % ALIGNMENT for address in addresses])
        kind = device, aligned, changing and not -2**31 <= changing[0] < 2**31
        form = self._forms.get(kind)
        if form is None:
            self._first(kind, tensors, changing)
            return
        run, stream_of, function, metadata = form
        if count:
            addresses = [*map(_described, self._descriptors, tensors), *addresses]
        run(*self._grid, stream_of(device), function, metadata, None, None, None, *addresses, *self._numbers, *changing,
            *self._tail)

    def _first(self, kind: Any, tensors: tuple[Tensor | None, ...], changing: tuple[int, ...]) -> None:
        """Through Triton, which compiles what it has not yet."""
        count = len(self._layouts)
        descriptors = [None if layout is None else _descriptor(tensor, *layout)
                       for tensor, layout in zip(tensors[:count], self._layouts, strict=True)]
        compiled = self._kernel[self._grid](*descriptors, *tensors[count:], *self._numbers, *changing, **self._constants,
                                            **self._options)
        self._descriptors = [None if one is None else vars(one) | {"base": None} for one in descriptors]
        if KNOWN and compiled is not None and len(self._forms) < MOST_KINDS:  # Triton's interpreter compiles nothing
            self._forms[kind] = compiled.run, _stream_of(), compiled.function, compiled.packed_metadata


def _descriptor(tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(shape), list(strides), list(block))


def _described(fields: dict[str, Any] | None, tensor: Tensor | None) -> Any:
    """A descriptor like one that has been checked, of another tensor."""
    if fields is None:
        return None
    made = object.__new__(_descriptor_type())
    made.__dict__ = {**fields, "base": tensor}
    return made


@functools.cache
def _descriptor_type() -> type:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor


def _stream_of() -> Any:
    """The current stream's handle, by the number of a device."""
    return triton.runtime.driver.active.get_current_stream


@functools.cache
def is_hopper(index: int) -> bool:
    try:
        import triton.tools.tensor_descriptor  # noqa: F401  (older versions have none)
    except ImportError:
        return False
    return torch.cuda.get_device_capability(index)[0] == 9


@functools.cache
def multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
