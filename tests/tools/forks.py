"""Training runs in forks of one process that has imported everything: what they are asked, what
they tell, their end.

A child tells its parent over a pipe, a line at a time, what has become durable; a killed child
tells no more.
"""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from select import select
from typing import Any

from tests.support.patience import patience

STEPS = 8
PLACES: dict[str, dict[str, Any]] = {
    "ssd": {"*": "ssd"},
    "dram": {"*": "dram"},
    "gpu": {"*": "gpu"},
    "mixed": {"*": {"hi": "dram", "lo": "ssd", "m": "ssd", "v": "dram", "g": "dram"}, "block.1": "gpu"},
    "gradients": {"*": {"g": "ssd"}, "block.0": "ssd"},
}
CLIPS = {"eager": 0.0, "deferred": 0.5}
"""Deferred updates are there for clipping; so the two have different results."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One start of a run. Nothing here but ``optimizer`` may show in its result."""

    durable: str
    optimizer: str
    speculates: bool = False
    """Instead of deferring all updates: in every step, right or wrong."""
    place: str = "ssd"
    save_every: int = 1
    folders: tuple[str, ...] = ("a",)
    checkpoint_tier: str = "gpu"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """``status``: as `os.waitstatus_to_exitcode`; ``told``: what it has told. ``hung``: it had to
    be ended."""

    status: int
    told: tuple[tuple[str, ...], ...]
    errors: str
    hung: bool = False

    def last(self, subject: str) -> int | None:
        numbers = [int(words[1]) for words in self.told if words[0] == subject]
        return numbers[-1] if numbers else None


Tell = Callable[..., None]


class Site:
    """The directory of many runs: one model, one text, one SSD directory per folder name."""

    def __init__(self, path: Path) -> None:
        self.path, self.model, self.text = path, path / "model", path / "text.jsonl"

    def prepare(self) -> None:
        from tests.support.resume import make_text

        import_everything(self.model)
        make_text(self.text)

    def folder(self, name: str) -> Path:
        return self.path / "ssd" / name

    def train(self, out: Path, setting: Setting, tell: Tell, *, steps: int = STEPS) -> None:
        """Start the run, or take it up."""
        from ratel.planner.work import Buffers
        from ratel.runtime.session import training_step as training
        from ratel.training import run
        from ratel.training.states import StateDirectory
        from tests.support.resume import train

        tell_what_lasts(tell)
        session_class = run.Session
        # Not `partial`: what a run gives for these must not win.
        run.Session = lambda model, **options: session_class(
            model, **{**options, "placement": PLACES[setting.place], "buffers": Buffers(chunk_elements=4096)})
        optimizer = setting.optimizer
        if setting.speculates:
            optimizer, training.expects_no_scaling = "speculative", lambda before: True
        has_state = StateDirectory(out / "state").newest() is not None
        train(self.model, self.text, out, steps=steps, save_every=setting.save_every, durable=setting.durable,
              optimizer=optimizer, max_grad_norm=CLIPS[setting.optimizer], resume=has_state, export=True,
              overwrite=not has_state, ssd=[self.folder(name) for name in setting.folders],
              checkpoint_tier=setting.checkpoint_tier)

    def remove(self, out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        self.remove_ssd()

    def remove_ssd(self) -> None:
        shutil.rmtree(self.path / "ssd", ignore_errors=True)


def import_everything(model: Path) -> None:
    """Once, so that a fork starts in milliseconds, and what a run imports late as well. Makes
    ``model``."""
    import torch

    import ratel.data.dataset  # noqa: F401
    import ratel.data.tokens.tokenizer  # noqa: F401
    import ratel.runtime.states.export  # noqa: F401
    import ratel.training.run  # noqa: F401
    import tokenizers.trainers  # noqa: F401
    import torch._subclasses.schema_check_mode  # noqa: F401
    import transformers.convert_slow_tokenizer  # noqa: F401
    import transformers.tokenization_utils_tokenizers  # noqa: F401
    from ratel import models
    from tests.support.resume import make_model

    torch.set_num_threads(1)
    ended = in_fork(lambda tell: make_model(model))
    assert ended.status == 0, ended.errors
    # What transformers works out at its first model takes as long as all steps of a run here.
    models.load(model, dtype=torch.bfloat16, device=torch.device("cpu"), seed=0, loss_fn=None, attention="auto").close()
    assert threading.active_count() == 1, "a fork would miss what the others do"


def tell_what_lasts(tell: Tell) -> None:
    """In a child: have it tell of every state that is asked for, and that is durable; and where the
    run stands."""
    from ratel.runtime.states.targets import CommitLog, DirectoryTarget
    from ratel.runtime.states.saver import Saver
    from ratel.training import run
    from ratel.training.attempt import Attempt

    after(CommitLog, "write", lambda log, training, *rest: tell("lasts", training["extra"]["step"]))
    after(DirectoryTarget, "finish", lambda target, training: tell("lasts", training["extra"]["step"]))
    before(Saver, "request", lambda saver, target, training: tell("saving", training["extra"]["step"]))
    before(Attempt, "_loop", lambda *unused: tell("training", 0))
    original = run.take_up

    def take_up(*args: Any) -> Any:
        earlier = original(*args)
        tell("resumed", earlier.step)
        return earlier

    run.take_up = take_up


def before(owner: Any, name: str, act: Callable[..., object]) -> None:
    original = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        act(*args)
        return original(*args, **options)

    setattr(owner, name, call)


def after(owner: Any, name: str, act: Callable[..., object]) -> None:
    original = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        act(*args)
        return result

    setattr(owner, name, call)


def in_fork(act: Callable[[Tell], object], *, kill_after_s: float | None = None, counted_from: str | None = None,
            patience_s: float = 120.0) -> Ended:
    """Have a child do it. It is killed after a time, counted from what it tells first of
    ``counted_from``."""
    reader, writer = os.pipe()
    errors_reader, errors_writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(errors_writer, 2)
        os._exit(_status_of(act, lambda *words: os.write(writer, (" ".join(map(str, words)) + "\n").encode())))
    os.close(writer)
    os.close(errors_writer)
    told, errors, hung = _listen(child, reader, errors_reader, kill_after_s, counted_from, patience_s)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(reader)
    os.close(errors_reader)
    lines = told.decode().splitlines() if told.endswith(b"\n") or not told else told.decode().splitlines()[:-1]
    return Ended(status=status, told=tuple(tuple(line.split()) for line in lines), errors=errors.decode(), hung=hung)


def _status_of(act: Callable[[Tell], object], tell: Tell) -> int:
    try:
        act(tell)
        return 0
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1


def _listen(child: int, reader: int, errors_reader: int, kill_after_s: float | None, counted_from: str | None,
            patience_s: float) -> tuple[bytes, bytes, bool]:
    """Until the child has closed both pipes: it has ended."""
    heard = {reader: b"", errors_reader: b""}
    is_open = set(heard)
    end_s = time.monotonic() + patience(patience_s)
    kill_s = None if kill_after_s is None or counted_from else time.monotonic() + kill_after_s
    hung = False
    while is_open:
        wait_s = max(0.0, min(end_s, kill_s or end_s) - time.monotonic())
        for pipe in select(list(is_open), [], [], wait_s)[0]:
            part = os.read(pipe, 65536)
            heard[pipe] += part
            if not part:
                is_open.discard(pipe)
        if kill_after_s is not None and kill_s is None and counted_from.encode() in heard[reader]:
            kill_s = time.monotonic() + kill_after_s
        if time.monotonic() >= min(end_s, kill_s or end_s) and is_open:
            hung = kill_s is None or time.monotonic() < kill_s
            os.kill(child, signal.SIGKILL)  # ours, and not yet waited for: the number is nobody else's
            end_s, kill_s, kill_after_s = time.monotonic() + patience(10), None, None
    return heard[reader], heard[errors_reader], hung


def newest_step(out: Path) -> int:
    """After which the run would go on; 0 where there is no state."""
    from ratel.runtime.states.saved_state import SavedState
    from ratel.training.states import StateDirectory

    newest = StateDirectory(out / "state").newest()
    return 0 if newest is None else SavedState(newest).training["extra"]["step"]


def check_same(out: Path, whole: Path, folders: Collection[Path] = ()) -> None:
    """Metrics, exported model and every plane of the last state are equal to the last bit.
    ``folders``: where drives may be now."""
    import torch

    from ratel.runtime.states.saved_state import SavedState
    from ratel.training.states import StateDirectory
    from tests.support.resume import assert_same_run

    assert_same_run(out, whole)
    found, expected = (SavedState(StateDirectory(path / "state").newest(), list(folders)) for path in (out, whole))
    assert list(found.planes()) == list(expected.planes())
    for unit, plane in found.planes():
        assert torch.equal(found.read(unit, plane).view(torch.uint8), expected.read(unit, plane).view(torch.uint8)), \
            (unit, plane)


def check_clean(site: Site, out: Path, setting: Setting, *, but: Collection[str] = (), folders: Collection[Path] = ()) -> None:
    """All starts together leave one state, on SSD what it needs, and files of these names.
    ``folders``: where drives may be now."""
    from ratel.runtime.states.commits import committed_files

    left = sorted(entry.name for entry in (out / "state").iterdir())
    assert left in (["commits"], [f"step-{STEPS:08d}"]), left  # the last start may have found the run at its end
    on_ssd = {os.fspath(path.resolve()) for name in setting.folders for path in site.folder(name).iterdir() if path.name not in but}
    assert on_ssd <= committed_files(out / "state" / "commits", list(folders)), on_ssd
