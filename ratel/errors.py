"""The errors a user can cause, each naming the field, the value and the remedy."""


class RatelError(ValueError):
    """A mistake in what the user gave: which field, which value, and what to do about it.

    Raised before anything is touched. ``field`` is the option as the user wrote it (``--dram``, ``data``), ``value``
    what was given, ``remedy`` one sentence that begins with a verb.
    """

    def __init__(self, message: str, *, field: str | None = None, value: object = None, remedy: str | None = None) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        text = f"{field}: {message}" if field else message
        if value is not None:
            text += f" (given: {value})"
        if remedy:
            text += f". {remedy}"
        super().__init__(text)


class NonFiniteError(RuntimeError):
    """A gradient that is not finite reached an update that cannot be taken back (eager optimizer)."""


class WorkerError(RuntimeError):
    """A background thread failed; ``__cause__`` is its own exception. Raised at the caller's next call."""


class DamagedError(RuntimeError):
    """Bytes came back from a drive other than they were written. ``path`` is the file, ``message`` says what was in it."""

    def __init__(self, message: str, *, path: str) -> None:
        self.message, self.path = message, path
        super().__init__(f"{path} {message}")
