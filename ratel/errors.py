"""The errors a user can cause, each naming the field, the value and the remedy."""

import errno


class RatelError(ValueError):
    """A mistake in what the user gave: which field, which value, and what to do about it.

    Raised before anything is touched. ``field`` is the option as the user wrote it (``--dram``,
    ``data``), ``value`` what was given, ``remedy`` one sentence that begins with a verb.
    """

    def __init__(self, message: str, *, field: str | None = None, value: object = None, remedy: str | None = None) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        text = f"{field}: {message}" if field else message
        if value is not None:
            text += f" (given: {value})"
        if remedy:
            text += f". {remedy}"
        super().__init__(text)


def remedy_for(error: OSError, otherwise: str) -> str:
    """What helps where something could not be written: against a limit on the size of files room
    does not."""
    if error.errno == errno.EFBIG:
        return "Raise the limit on the size of a file (`ulimit -f`), or give a directory whose file system takes one that large"
    return otherwise


_SHOWN = 200
"""Characters of a library's own message, which may be a page."""


def out_of(error: BaseException) -> str | None:
    """What the system has refused this process, where that is what the error tells of; None where
    it is another."""
    whole = " ".join(f"{type(error).__name__}: {error}".split())
    text = whole if len(whole) <= _SHOWN else f"{whole[:_SHOWN]} ..."
    if isinstance(error, MemoryError) or any(words in whole for words in ("failed to map segment", "allocate memory", "Cannot allocate")):
        return f"the system gives this process no more memory ({text}). Raise its limit (`ulimit -v`, a container's), or free memory"
    if "can't start new thread" in whole or (isinstance(error, OSError) and error.errno == errno.EAGAIN):
        return f"the system gives this process no more threads ({text}). Raise its limit (`ulimit -u`, a container's)"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return f"the system opens no more files for this process ({text}). Raise its limit (`ulimit -n`)"
    return None


class NonFiniteError(RuntimeError):
    """A gradient that is not finite reached an update that cannot be taken back (eager
    optimizer)."""


class WorkerError(RuntimeError):
    """A background thread failed; ``__cause__`` is its own exception. Raised at the caller's next
    call."""


class DamagedError(RuntimeError):
    """Bytes came back from a drive other than they were written. ``path`` is the file, ``message``
    says what was in it."""

    def __init__(self, message: str, *, path: str) -> None:
        self.message, self.path = message, path
        super().__init__(f"{path} {message}")
