"""Every conversation rendered before a run comes to it: a bad line must end a run at its start, not
after days.

What is read in the first seconds is checked before the run starts. The rest is checked in a thread,
which works a quarter of the time so that steps are not held up; what it finds is raised with the
next batch.
"""

import threading
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

from ratel import interrupt
from ratel.data.review.survey import Entry, Totals, survey
from ratel.data.sources.corpus import Corpus
from ratel.data.sources.records import Chat
from ratel.errors import RatelError
from ratel.units import format_count

AT_ONCE_S = 2.0
_SHARE = 0.25
_JOIN_S = 2.0


class ConversationCheck:
    """``encode`` makes documents and raises RecordError. ``seen``: of the conversations so far."""

    def __init__(self, corpora: list[Corpus], encode: Callable[[Any], Any], *, seq_len: int) -> None:
        self._encode, self._seq_len = encode, seq_len
        self._found: RatelError | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._entries = _entries(corpora, lambda record: self._encode(record))
        self.is_done = False
        self.seen = Totals()

    def at_once(self, seconds: float | None = None) -> None:
        """Check in the caller's thread; raises what it finds."""
        until_s = perf_counter() + (AT_ONCE_S if seconds is None else seconds)
        while not self.is_done and perf_counter() < until_s:
            interrupt.check()
            self._one()
        self.raise_found()

    def go_on(self, own_encode: Callable[[], Callable[[Any], Any]]) -> None:
        """Check on in a thread, from where the check stands. ``own_encode`` makes an encoder for
        it: a tokenizer serves one thread."""
        if not self.is_done and self._thread is None:
            self._encode = own_encode()
            self._stopped.clear()
            self._thread = threading.Thread(target=self._run, name="ratel-check", daemon=True)
            self._thread.start()

    def describe(self) -> str:
        """What is worth a line about the conversations seen: nothing, if all is as one would
        think."""
        parts = []
        if self.seen.rewritten:
            parts.append(f"{self.seen.rewritten} are learned in {self.seen.texts - self.seen.records + self.seen.rewritten} texts, because "
                         "the template rewrites what was said before")
        if self.seen.cut:
            parts.append(f"{self.seen.cut} texts are longer than a sequence and cut")
        return f"of the first {format_count(self.seen.records, 'conversation')} " + " and ".join(parts) if parts else ""

    def raise_found(self) -> None:
        if self._found is not None:
            raise self._found

    def stop(self) -> None:
        """End the thread; ``go_on`` can go on from here."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join(_JOIN_S)
            self._thread = None

    def _run(self) -> None:
        while not self.is_done:
            begun_s = perf_counter()
            self._one()
            if self._stopped.wait((perf_counter() - begun_s) * (1 / _SHARE - 1)):
                return

    def _one(self) -> None:
        try:
            corpus, entry = next(self._entries)
        except StopIteration:
            self.is_done = True
        except Exception:  # a file that is gone, say: whoever makes the batches meets it, too, and says so
            self.is_done = True
        else:
            if isinstance(entry.record, Chat):
                self.seen.add(entry, self._seq_len)
            if entry.error is not None:
                self._found = corpus.line_error(entry.source, entry.error_line, entry.error)
                self.is_done = True


def _entries(corpora: list[Corpus], encode: Callable[[Any], Any]) -> Iterator[tuple[Corpus, Entry]]:
    """The entries whose records have a form that their corpus has checked."""
    def encode_chat(record: Any) -> Any:
        return encode(record) if isinstance(record, Chat) else None

    for corpus in corpora:
        left = corpus.max_checked_bytes
        for source in corpus.sources:
            if source.suffix == ".jsonl" and left > 0:
                for entry in survey([source], encode_chat, parse=corpus.parse):
                    if entry.offset >= left:
                        break
                    yield corpus, entry
            left -= source.num_bytes
