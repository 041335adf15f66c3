"""Every test with a ``backend`` runs on both."""

from tests.support.engines import backend  # noqa: F401
