"""A check that runs inside a user's program says nothing but what it found."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, warnings or log lines of transformers and of the sessions inside."""
    from transformers.utils import logging as theirs

    ours, level, verbosity = logging.getLogger("ratel"), logging.getLogger("ratel").level, theirs.get_verbosity()
    shows_progress = theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    ours.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ours.setLevel(level)
        theirs.set_verbosity(verbosity)
        if shows_progress:
            theirs.enable_progress_bar()
