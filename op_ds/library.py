"""Loads the shared library and declares its C functions, nothing else."""

import ctypes
import functools
import os
from pathlib import Path

LIBRARY_PATH = Path(__file__).parent / "_lib" / "libop_ds.so"
ABI_VERSION = 5


class LibraryError(ImportError):
    """The compiled library is missing or belongs to another version of this package."""


class AdamPlanes(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("hi", "lo", "m", "v", "to_hi", "to_lo", "to_m", "to_v", "grad")),
                ("grad_type", ctypes.c_int32), ("moment_type", ctypes.c_int32), ("streams", ctypes.c_int32),
                ("first", ctypes.c_uint32)]


class AdamScalars(ctypes.Structure):
    _fields_ = [("grad_scale", ctypes.c_float), ("lerp_weight", ctypes.c_float), ("beta2", ctypes.c_float),
                ("one_minus_beta2", ctypes.c_float), ("bias_correction2_sqrt", ctypes.c_float), ("eps", ctypes.c_float),
                ("neg_step_size", ctypes.c_float), ("coupled", ctypes.c_int32),
                ("keys", ctypes.c_uint32 * 2)]


_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "pool_create": (_INT, _INT, ctypes.POINTER(_POINTER)),
    "pool_destroy": (_POINTER,),
    "adam": (_POINTER, ctypes.POINTER(AdamPlanes), ctypes.POINTER(AdamScalars), _LONG, ctypes.POINTER(_LONG),
             ctypes.POINTER(_FLOAT), _LONG),
    "split": (_POINTER, _POINTER, _POINTER, _POINTER, _LONG),
    "merge": (_POINTER, _POINTER, _POINTER, _POINTER, _LONG),
    "sum_squares": (_POINTER, _POINTER, _INT, _LONG, ctypes.POINTER(ctypes.c_double), ctypes.POINTER(_LONG)),
    "crc32": (_POINTER, _POINTER, _LONG, _LONG, _POINTER),
    "touch": (_POINTER, _POINTER, _LONG),
    "fill": (_POINTER, _POINTER, _INT, _LONG),
    "copy": (_POINTER, _POINTER, _POINTER, _LONG),
    "triad": (_POINTER, _POINTER, _POINTER, _POINTER, _FLOAT, _LONG),
    "rescale": (_POINTER, _POINTER, _FLOAT, _LONG),
}


def _open(path: Path) -> ctypes.CDLL:
    remedy = "Build it with: python -m op_ds.build"
    if not path.exists():
        raise LibraryError(f"op_ds: the native library {path} is missing. {remedy}")
    try:
        library = ctypes.CDLL(os.fspath(path))
    except OSError as error:
        raise LibraryError(f"op_ds: {path} cannot be loaded ({error}). {remedy}") from error
    found = library.op_ds_abi_version()
    if found != ABI_VERSION:
        raise LibraryError(f"op_ds: {path} has ABI {found}, this package needs {ABI_VERSION}. {remedy}")
    return library


@functools.cache
def load(path: Path = LIBRARY_PATH) -> ctypes.CDLL:
    """The library with its functions declared. CDLL calls release the GIL."""
    library = _open(path)
    library.op_ds_pool_isa.argtypes = [_POINTER]
    library.op_ds_pool_isa.restype = ctypes.c_char_p
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, f"op_ds_{name}")
        function.argtypes = list(arguments)
        function.restype = _INT
    return library
