"""What the user watches: a live line on a terminal, plain lines anywhere else, nothing when
quiet."""

from collections import deque
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ratel.monitor.side_channel import SideChannel
from ratel.units import format_seconds

_RECENT_STEPS = 20
_WIDTH_WITH_BAR = 110
"""Columns. On a narrower terminal a bar would wrap the numbers, which say more."""


class ProgressDisplay:
    """Shows the records that go to metrics.jsonl. ``note`` prints a line beside them."""

    def __init__(self, total_steps: int, *, log_every: int = 10, quiet: bool = False,
                 console: Console | None = None) -> None:
        self._console = console or Console(file=SideChannel(), quiet=quiet, highlight=False)
        self._total, self._log_every = total_steps, log_every
        self._recent_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._live: Progress | None = None

    def start(self, first_step: int = 0) -> None:
        if self._console.is_terminal and not self._console.quiet:
            bar = [BarColumn(bar_width=24)] if self._console.width >= _WIDTH_WITH_BAR else []
            self._live = Progress(TextColumn("step"), MofNCompleteColumn(), *bar, TextColumn("{task.description}"),
                                  console=self._console)
            self._task = self._live.add_task("the first one takes longer", total=self._total, completed=first_step)
            self._live.start()

    def step(self, record: dict[str, Any]) -> None:
        self._recent_s.append(record["step_s"])
        left = self._total - record["step"]
        text = describe_step(record, eta_s=left * median(self._recent_s))
        if self._live is not None:
            self._live.update(self._task, completed=record["step"], description=text)
        elif record["step"] % self._log_every == 0 or record["step"] in (1, self._total) or "eval_loss" in record:
            self.note(f"step {record['step']}/{self._total}  {text}")

    def note(self, text: str) -> None:
        # No markup: paths and messages contain brackets; no wrapping: a log line is one line.
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> "ProgressDisplay":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def describe_step(record: dict[str, Any], *, eta_s: float) -> str:
    parts = [f"loss {record['loss']:.4f}"]
    if "eval_loss" in record:
        parts.append(f"eval {record['eval_loss']:.4f}")
    if "eval_accuracy" in record:
        parts.append(f"accuracy {record['eval_accuracy']:.1%}")
    parts.append(f"{record['tokens_per_s']:,.0f} tok/s")
    if record["bound_by"]:
        parts.append(f"{record['bound_by']} binds ({record['bound_s'] / record['step_s']:.0%})")
    if record["skipped"]:
        parts.append("skipped: not finite")
    if eta_s:
        parts.append(f"ETA {format_seconds(eta_s)}")
    return "  ".join(parts)
