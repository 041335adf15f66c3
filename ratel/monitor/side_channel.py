"""A stream for what a run tells beside its results: what cannot be shown is dropped."""

import io
import sys
from typing import Any


class SideChannel(io.TextIOBase):
    """Standard output as it is at each moment. It may be closed, a pipe without a reader, on a full
    disk, of an encoding without the character: none of that is the run's matter."""

    def write(self, text: str) -> int:
        try:
            self._write(text)
        except (OSError, ValueError, AttributeError):  # the last two of a stream that is closed, or is none
            pass
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError, AttributeError):
            pass

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError, AttributeError):
            return False

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def _stream(self) -> Any:
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # a live display takes its place for others

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
