"""Forked children of a session's process, and threads beside the one that uses it: refused, and
harming nothing."""

import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from ratel.errors import RatelError
from ratel.monitor.metrics import MetricsWriter
from ratel.runtime.session.entrance import Entrance, entered
from ratel.runtime.session.session import Session
from ratel.startup import arena_ahead
from tests.support.families import batches, llama
from tests.support.patience import patience
from tests.support.sessions import open_session
from tests.tools.interrupting import Tracer, interrupt, moments

pytestmark = pytest.mark.numerics
REFUSED = "belongs to the process that this one was forked from"


def open_on_ssd(ssd: Path, **options) -> Session:
    torch.manual_seed(0)
    return open_session(ssd, model=llama(), tier="ssd", **options)


def in_child(act: Callable[[], object], *, patience_s: int = 60) -> int:
    """The exit status of a fork that does it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            import faulthandler

            faulthandler.dump_traceback_later(patience(patience_s), exit=True)
            act()
            gc.collect()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_is_refused_and_harms_nothing(ssd_dir: Path, tmp_path: Path) -> None:
    """It asks for everything, closes the session and ends; the parent goes on as if it had not
    been."""
    given = batches("llama", 4)
    with open_on_ssd(ssd_dir) as session:
        expected = [session.step(batch).loss for batch in given]
    with open_on_ssd(ssd_dir) as session:
        losses = [session.step(batch).loss for batch in given[:2]]
        files = sorted(ssd_dir.iterdir())
        assert files

        def use() -> None:
            calls = (lambda: session.step(given[2]), session.flush, lambda: session.evaluate(given[:1]), session.state_dict,
                     lambda: session.save(tmp_path / "state"), lambda: session.export(tmp_path / "model"))
            for call in calls:
                with pytest.raises(RatelError, match=REFUSED):
                    call()
            with pytest.raises(RuntimeError, match="does not survive fork"):
                session._machinery.engine.create_volume([ssd_dir], "of-the-child", 4096)
            with pytest.raises(RuntimeError, match="does not survive fork"):
                session._machinery.engine.wait(1)
            session.close()
            with pytest.raises(RatelError, match="closed"):
                session._core.check_usable()

        assert in_child(use) == 0
        assert in_child(lambda: session.__exit__(None, None, None)) == 0
        at_exit = [session._machinery._finalizer, session._machinery.engine._finalizer, arena_ahead.drop]
        assert in_child(lambda: [finish() for finish in at_exit]) == 0, "what is registered for the end of a process"
        assert sorted(ssd_dir.iterdir()) == files and not list(tmp_path.iterdir())
        losses += [session.step(batch).loss for batch in given[2:]]
    assert losses == expected and not list(ssd_dir.iterdir())


def test_workers_of_a_data_loader_fork_from_an_open_session(ssd_dir: Path) -> None:
    rows = [{"input_ids": row} for batch in batches("llama", 2) for row in batch["input_ids"]]
    loader = torch.utils.data.DataLoader(rows, batch_size=2, num_workers=1, multiprocessing_context="fork")
    losses = []
    for workers in (0, 1):
        with open_on_ssd(ssd_dir) as session:
            session.step(batches("llama", 1)[0])
            source = loader if workers else torch.utils.data.DataLoader(rows, batch_size=2)
            losses.append([session.step(batch).loss for batch in source])
    assert losses[0] == losses[1] and len(losses[0]) > 1


def test_a_child_does_not_wait_for_the_threads_of_a_run(tmp_path: Path) -> None:
    """It unwinds what it is in the middle of, as a user's code that forks and calls sys.exit."""
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write({"step": 1})
        assert in_child(writer.close) == 0
        writer.write({"step": 2})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


class Net(nn.Module):

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def test_a_second_thread_is_refused_and_harms_nothing(ssd_dir: Path) -> None:
    batch, inside, may_go = torch.ones(4, 8), threading.Event(), threading.Event()
    waits = False

    def loss_fn(model: nn.Module, given: torch.Tensor) -> torch.Tensor:
        if waits:
            inside.set()
            assert may_go.wait(patience(60))
        return model(given).square().mean()

    options = dict(loss_fn=loss_fn, ssd=[ssd_dir], tier="ssd", device="cpu", dtype="fp32", lr=1e-2, micro_batch=4)
    with Session(Net(), **options) as session:
        expected = [session.step(batch).loss for _ in range(3)]
    with Session(Net(), **options) as session:
        losses = [session.step(batch).loss]
        waits = True
        first = threading.Thread(target=lambda: losses.append(session.step(batch).loss), daemon=True)
        first.start()
        assert inside.wait(patience(60))
        for call in (lambda: session.step(batch), lambda: session.evaluate([batch]), session.flush, session.close):
            with pytest.raises(RatelError, match="another thread is in a call of this session"):
                call()
        waits = False
        may_go.set()
        first.join(patience(60))
        losses.append(session.step(batch).loss)  # one after the other is allowed
    assert losses == expected


@pytest.mark.parametrize("where", ["loss", "hook", "batches"])
def test_a_call_inside_a_call_is_refused_and_harms_nothing(where: str, ssd_dir: Path, tmp_path: Path) -> None:
    batch, inside, refused = torch.ones(4, 8), False, []

    def act() -> None:
        calls = {"step": lambda: session.step(batch), "evaluate": lambda: session.evaluate([batch]), "close": session.close,
                 "save": lambda: session.save(tmp_path / "state"), "state_dict": session.state_dict, "plan_for": lambda: session.plan_for(4, 8),
                 "flush": session.flush, "wait_saved": session.wait_saved}
        for name, call in calls.items() if inside else ():
            with pytest.raises(RatelError, match=f"{name}: is called inside (step|evaluate), by a hook or an iterator of batches"):
                call()
            refused.append(name)

    def loss_fn(model: nn.Module, given: torch.Tensor) -> torch.Tensor:
        if where == "loss":
            act()
        return model(given).square().mean()

    def some_batches() -> Iterator[torch.Tensor]:
        if where == "batches":
            act()
        yield batch

    def run() -> tuple[list[float], float]:
        return [session.step(batch).loss for _ in range(3)], session.evaluate(some_batches())

    options = dict(loss_fn=loss_fn, ssd=[ssd_dir], tier="ssd", device="cpu", dtype="fp32", lr=1e-2, micro_batch=4)
    with Session(Net(), **options) as session:
        expected = run()
    net = Net()
    if where == "hook":
        net.head.register_forward_hook(lambda *unused: act())
    with Session(net, **options) as session:
        first = session.step(batch).loss
        inside = True
        losses = [first, *(session.step(batch).loss for _ in range(2))]
        inside = where == "batches"
        found = losses, session.evaluate(some_batches())
        session.save(tmp_path / "state")
    assert found == expected and len(refused) >= 8


def test_a_session_that_nobody_closes_leaves_nothing(ssd_dir: Path) -> None:
    before = threading.active_count()
    session = open_on_ssd(ssd_dir)
    session.step(batches("llama", 1)[0])
    machinery = weakref.ref(session._machinery)
    assert list(ssd_dir.iterdir()) and threading.active_count() > before
    del session
    gc.collect()
    assert machinery() is None and not list(ssd_dir.iterdir()) and threading.active_count() == before


def test_an_exception_at_any_line_of_the_door_leaves_it_open() -> None:
    """Also for `close`, which is refused inside another call."""
    class Room:
        def __init__(self) -> None:
            self._entrance = Entrance()

        @entered
        def step(self) -> int:
            with pytest.raises(RatelError, match="close: is called inside step"):
                self.close()
            return 1

        @entered
        def close(self) -> int:
            return 2

    whole = Tracer()
    whole.run(Room().step)
    tried = [moment for moment in moments(whole.hits) if moment.file.endswith("entrance.py")]
    for moment in tried:
        room = Room()
        with suppress(KeyboardInterrupt):
            Tracer(moment, interrupt).run(room.step)
        assert (room.step(), room.close()) == (1, 2)
    assert len(tried) > 20
