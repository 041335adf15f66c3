"""Native NVMe I/O: asynchronous, O_DIRECT, striped over directories, with priorities. Standard
library only.

The shared library is loaded when the first Engine is made; ``python -m nvme_ds.build`` compiles it.
"""

from nvme_ds.buffer import AlignedBuffer
from nvme_ds.engine import ACTIVATION, ALIGNMENT, BACKGROUND, OPTIMIZER, WEIGHT, WRITEBACK, Engine, IoSpan
from nvme_ds.errors import BuildError, IoError, NoSpaceError, StallError
from nvme_ds.volume import Volume

__all__ = ["ACTIVATION", "ALIGNMENT", "BACKGROUND", "OPTIMIZER", "WEIGHT", "WRITEBACK", "AlignedBuffer", "BuildError",
           "Engine", "IoError", "IoSpan", "NoSpaceError", "StallError", "Volume"]
