"""Models taken apart: any model becomes units of parameters and stages that run one at a time."""

from ratel.models.inputs import BlockInputs
from ratel.models.load import load
from ratel.models.parts import Parts

__all__ = ["BlockInputs", "Parts", "load"]
