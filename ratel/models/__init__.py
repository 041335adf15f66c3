"""Models taken apart: any model becomes units of parameters and stages that run one at a time."""

from ratel.models.load import load
from ratel.models.parts import Parts
from ratel.models.structure.inputs import BlockInputs

__all__ = ["BlockInputs", "Parts", "load"]
