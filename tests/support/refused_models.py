"""Models that are refused. No tests here."""

from typing import Any

import pytest
import torch

from ratel.errors import RatelError
from ratel.models import load
from tests.models.test_modules import make_patches
from tests.support.models import CPU


def refused(message: str, source: Any, **settings: Any) -> RatelError:
    settings = {"dtype": torch.float32, "device": CPU} | settings
    with pytest.raises(RatelError, match=message) as caught:
        parts = load(source, **settings)
        parts.stored.check_source()
        parts.probe(make_patches())
    assert caught.value.field
    return caught.value
