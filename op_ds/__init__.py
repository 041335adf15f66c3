"""Native CPU optimizer on fp32 masters stored as two 16-bit planes. Stands alone: no torch, no
other package (numpy only inside the call that returns an array).

The library is loaded by the first ``Pool``, so that ``python -m op_ds.build`` can make it.
"""

from op_ds.coefficients import AdamCoefficients, adam_coefficients, check_ranges, decay_factor, to_fp32
from op_ds.library import LibraryError
from op_ds.pool import MOMENT_BLOCK, Pool, UnsupportedIsaError
from op_ds.rounding import Rounding, rounding_key

__all__ = ["AdamCoefficients", "LibraryError", "MOMENT_BLOCK", "Pool", "Rounding", "UnsupportedIsaError",
           "adam_coefficients", "check_ranges", "decay_factor", "rounding_key", "to_fp32"]
