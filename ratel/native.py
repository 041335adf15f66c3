"""The one door to native code: the rest of the package imports ``op_ds`` and ``nvme_ds`` from
here."""

import nvme_ds
import nvme_ds.bench
import op_ds
import op_ds.bench

__all__ = ["nvme_ds", "op_ds"]
