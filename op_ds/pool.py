"""The optimizer's threads and what they do. Addresses are plain integers; the caller owns and
outlives the memory."""

import ctypes
import errno
import os
import threading
from typing import TYPE_CHECKING

from op_ds.coefficients import adam_coefficients, check_ranges, decay_factor, to_fp32
from op_ds.library import AdamPlanes, AdamScalars, load
from op_ds.rounding import Rounding

if TYPE_CHECKING:
    import numpy

_ISAS = {"auto": 0, "scalar": 1, "avx2": 2, "avx512": 3}
_DTYPES = {"bf16": 0, "fp32": 1}
MOMENT_BLOCK, _BLOCK_BYTES = 128, 132
"""Elements of a block of 8-bit moments, and its bytes: their codes, and the step of these as
fp32."""
_MOMENTS = {"fp32": 0, "bf16": 1, "8bit": 2}
ISA_VARIABLE = "RATEL_ISA"

Ranges = list[tuple[int, float]]
Planes = tuple[int, int, int, int]
"""Addresses of `hi`, `lo`, `m`, `v`."""


class UnsupportedIsaError(ValueError):
    """An instruction set was forced that this processor, or this build of the library, does not
    have."""


def _choose_isa(isa: str) -> str:
    chosen, source = isa, "isa"
    if isa == "auto" and os.environ.get(ISA_VARIABLE):
        chosen, source = os.environ[ISA_VARIABLE], ISA_VARIABLE
    if chosen not in _ISAS:
        raise ValueError(f"{source} must be one of {', '.join(_ISAS)} (given: {chosen!r})")
    return chosen


def _dtype_code(dtype: str) -> int:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)} (given: {dtype!r})")
    return _DTYPES[dtype]


def _check_count(n: int, name: str = "n") -> None:
    if n < 0:
        raise ValueError(f"{name} must not be negative (given: {n})")


def _check_moments(moments: str, rounding: Rounding | None, ranges: Ranges) -> None:
    if moments not in _MOMENTS:
        raise ValueError(f"moments must be one of {', '.join(_MOMENTS)} (given: {moments!r})")
    if (moments == "fp32") != (rounding is None):
        raise ValueError("moments that are not fp32 are rounded, others are not "
                         f"(given: moments {moments!r}, rounding {rounding})")
    if moments == "8bit" and any(end % MOMENT_BLOCK for end, _ in ranges):
        raise ValueError(f"ranges of 8-bit moments end with a block of {MOMENT_BLOCK} (given: {ranges})")


def moment_bytes(moments: str, n: int) -> int:
    """How many bytes ``n`` moments take."""
    return n // MOMENT_BLOCK * _BLOCK_BYTES if moments == "8bit" else n * (2 if moments == "bf16" else 4)


def _check_targets(planes: Planes, to: Planes, n: int, moments: int) -> None:
    for source, target, num_bytes in zip(planes, to, (2 * n, 2 * n, moments, moments), strict=True):
        if source != target and abs(source - target) < num_bytes:
            raise ValueError("an update's planes and where they go must be the same or not overlap")


class Pool:
    """``num_threads`` threads, the calling one included, that update optimizer planes.

    Calls block, release the GIL and may come from any thread; they run one after another. No result
    depends on the number of threads, the instruction set or how a vector is cut into calls
    (``sum_squares``: one call per vector). ``isa`` forces a path and raises UnsupportedIsaError
    where the processor lacks it; with ``"auto"`` the environment variable ``RATEL_ISA`` may do the
    same. ``pool.isa`` is what runs.
    """

    def __init__(self, num_threads: int, isa: str = "auto") -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1 (given: {num_threads})")
        chosen = _choose_isa(isa)
        self._library = load()
        self._handle: ctypes.c_void_p | None = None
        self._owner_pid = os.getpid()
        self._idle = threading.Condition()
        self._users: set[int] = set()
        """The threads that are in a call now."""
        handle = ctypes.c_void_p()
        status = self._library.op_ds_pool_create(num_threads, _ISAS[chosen], ctypes.byref(handle))
        if status == -errno.ENOTSUP:
            raise UnsupportedIsaError(f"this processor or build cannot run the forced instruction set {chosen!r}")
        _check_status(status, "pool_create")
        self._handle = handle
        self.num_threads = num_threads
        self.isa: str = self._library.op_ds_pool_isa(handle).decode()

    def adamw(self, hi: int, lo: int, m: int, v: int, grad: int, n: int, *, grad_dtype: str, lr: float, beta1: float,
              beta2: float, eps: float, step: int, grad_scale: float = 1.0, ranges: Ranges | None = None,
              to: Planes | None = None, moments: str = "fp32", rounding: Rounding | None = None) -> None:
        """One AdamW step on ``n`` parameters: fp32 master in ``hi``/``lo``, ``m`` and ``v``, all
        updated in place. Moments are ``fp32``, ``bf16``, or ``8bit`` in blocks of `MOMENT_BLOCK`
        elements; all but fp32 ones are rounded as ``rounding`` draws.

        ``ranges`` are (end element, weight decay) with increasing ends, the last one ``n``;
        default: no decay. ``grad_scale`` multiplies every gradient first (clipping, unscaling);
        ``step`` counts from 1. ``to``: write the result there and leave what was read as it is;
        each plane is another place altogether, or the same one.
        """
        ranges = [(n, 0.0)] if ranges is None else ranges
        self._adam([decay_factor(lr, decay) for _, decay in ranges], False, (hi, lo, m, v), to, grad, n,
                   grad_dtype, ranges, moments, rounding, lr=lr, beta1=beta1, beta2=beta2, eps=eps, step=step,
                   grad_scale=grad_scale)

    def adam(self, hi: int, lo: int, m: int, v: int, grad: int, n: int, *, grad_dtype: str, lr: float, beta1: float,
             beta2: float, eps: float, step: int, grad_scale: float = 1.0, ranges: Ranges | None = None,
             to: Planes | None = None, moments: str = "fp32", rounding: Rounding | None = None) -> None:
        """The same as ``adamw``, but with the decay added to the scaled gradient (L2), as
        ``torch.optim.Adam`` does."""
        ranges = [(n, 0.0)] if ranges is None else ranges
        self._adam([to_fp32(decay) for _, decay in ranges], True, (hi, lo, m, v), to, grad, n,
                   grad_dtype, ranges, moments, rounding, lr=lr, beta1=beta1, beta2=beta2, eps=eps, step=step,
                   grad_scale=grad_scale)

    def _adam(self, decays: list[float], coupled: bool, planes: Planes, to: Planes | None, grad: int, n: int,
              grad_dtype: str, ranges: Ranges, moments: str, rounding: Rounding | None, **hyperparameters: float) -> None:
        _check_count(n)
        check_ranges(ranges, n)
        to = planes if to is None else to
        _check_moments(moments, rounding, ranges)
        _check_targets(planes, to, n, moment_bytes(moments, n))
        keys, first = ((0, 0), 0) if rounding is None else (rounding.keys, rounding.counter)
        k = adam_coefficients(**hyperparameters)
        scalars = AdamScalars(k.grad_scale, k.lerp_weight, k.beta2, k.one_minus_beta2, k.bias_correction2_sqrt, k.eps,
                              k.neg_step_size, coupled, keys)
        given = AdamPlanes(*planes, *to, grad, _dtype_code(grad_dtype), _MOMENTS[moments], 0, first)
        ends = (ctypes.c_int64 * len(ranges))(*(end for end, _ in ranges))
        factors = (ctypes.c_float * len(ranges))(*decays)
        self._call("adam", ctypes.byref(given), ctypes.byref(scalars), n, ends, factors, len(ranges))

    def split(self, fp32: int, hi: int, lo: int, n: int) -> None:
        """fp32 -> ``hi`` (bf16, rounded half up on the bits) and ``lo`` (int16 remainder); exact,
        any bits."""
        _check_count(n)
        self._call("split", fp32, hi, lo, n)

    def merge(self, hi: int, lo: int, fp32: int, n: int) -> None:
        """The inverse of ``split``, bit for bit."""
        _check_count(n)
        self._call("merge", hi, lo, fp32, n)

    def sum_squares(self, values: int, n: int, dtype: str) -> tuple[float, int]:
        """Sum of squares in doubles, and how many values are infinite or NaN (then the sum is not
        finite either)."""
        _check_count(n)
        total, num_nonfinite = ctypes.c_double(), ctypes.c_int64()
        self._call("sum_squares", values, _dtype_code(dtype), n, ctypes.byref(total), ctypes.byref(num_nonfinite))
        return total.value, num_nonfinite.value

    def crc32(self, address: int, num_bytes: int, piece_bytes: int,
              out: "numpy.ndarray | None" = None) -> "numpy.ndarray":
        """CRC-32, as ``zlib.crc32`` gives it, of each ``piece_bytes`` of memory; the last piece is
        what is left.

        Returns uint32, one per piece: ``out`` where it is given (contiguous, of exactly that size),
        else a new array. Pieces are what the threads share, so one large piece is the work of one
        thread. Needs numpy.
        """
        import numpy

        _check_count(num_bytes, "num_bytes")
        if piece_bytes < 1:
            raise ValueError(f"piece_bytes must be at least 1 (given: {piece_bytes})")
        num_pieces = -(-num_bytes // piece_bytes)
        if out is None:
            out = numpy.empty(num_pieces, dtype=numpy.uint32)
        elif out.dtype != numpy.uint32 or out.shape != (num_pieces,) or not out.flags.carray:
            raise ValueError(f"out must be a writable contiguous uint32 array of {num_pieces} elements "
                             f"(given: {out.dtype} of shape {out.shape}, strides {out.strides}, "
                             f"writable: {out.flags.writeable})")
        self._call("crc32", address, num_bytes, piece_bytes, out.ctypes.data)
        return out

    def touch(self, address: int, num_bytes: int) -> None:
        """Make the kernel map fresh memory, in parallel. What is there stays, also what others
        write meanwhile."""
        _check_count(num_bytes, "num_bytes")
        self._call("touch", address, num_bytes)

    def fill(self, address: int, num_bytes: int, byte: int = 0) -> None:
        _check_count(num_bytes, "num_bytes")
        if not 0 <= byte <= 255:
            raise ValueError(f"byte must be in [0, 255] (given: {byte})")
        self._call("fill", address, byte, num_bytes)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Copy with streaming stores; the two ranges must not overlap."""
        _check_count(num_bytes, "num_bytes")
        if target < source + num_bytes and source < target + num_bytes and num_bytes > 0:
            raise ValueError("source and target of a copy must not overlap")
        self._call("copy", target, source, num_bytes)

    def triad(self, a: int, b: int, c: int, scale: float, n: int) -> None:
        """fp32 ``a = b + scale * c`` with streaming stores: 12 bytes of traffic an element. For
        measuring bandwidth."""
        _check_count(n)
        self._call("triad", a, b, c, scale, n)

    def rescale(self, a: int, scale: float, n: int) -> None:
        """fp32 ``a = scale * a``: 8 bytes of traffic an element, read before written. For measuring
        bandwidth."""
        _check_count(n)
        self._call("rescale", a, scale, n)

    def close(self) -> None:
        """Wait for calls in flight and stop the threads. Idempotent."""
        me = threading.get_ident()  # is in no call: an exception that came into the end of one may have left it among them
        with self._idle:
            handle, self._handle = self._handle, None
            self._idle.wait_for(lambda: self._users <= {me})
        if handle is not None and os.getpid() == self._owner_pid:
            _check_status(self._library.op_ds_pool_destroy(handle), "pool_destroy")

    def _call(self, name: str, *arguments: object) -> None:
        me = threading.get_ident()
        with self._idle:
            if self._handle is None:
                raise RuntimeError("the pool is closed")
            if os.getpid() != self._owner_pid:
                raise RuntimeError("a Pool does not survive fork, its threads stay in the parent: make one per process")
            handle = self._handle
            self._users.add(me)
        try:
            _check_status(getattr(self._library, f"op_ds_{name}")(handle, *arguments), name)
        finally:
            with self._idle:
                self._users.discard(me)
                self._idle.notify_all()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()


def _check_status(status: int, what: str) -> None:
    if status < 0:
        raise OSError(-status, f"op_ds {what}: {os.strerror(-status)}")
