"""Kills a training run again and again, and resumes it. A process of its own, which the forks can start from at once.

    python kill_run.py DIRECTORY SEED NUM_KILLS

Prints one JSON object per kill. DIRECTORY/whole is the run that nobody killed, DIRECTORY/out the other one.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 20
OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir")
"""What changes which state is there. A save of this model makes about a dozen of these calls."""


def main(directory: Path, seed: int, num_kills: int) -> None:
    import torch  # noqa: F401  imported here once, so that a fork starts in milliseconds
    import transformers.models.llama.modeling_llama  # noqa: F401

    import ratel.train.run  # noqa: F401
    from resume_common import make_model, make_text

    model, text = directory / "model", directory / "text.jsonl"
    in_fork(lambda: (make_model(model), make_text(text)))
    begun = time.perf_counter()
    in_fork(lambda: start(model, text, directory / "whole", directory, 0))
    whole_s = time.perf_counter() - begun
    draw = random.Random(seed)
    for number in range(num_kills):
        operation = draw.randint(7, 45) if number % 2 else None
        delay_s = None if operation else draw.uniform(0.1, 0.5) * whole_s
        status = in_fork(lambda: start(model, text, directory / "out", directory, number, operation), delay_s)
        print(json.dumps({"delay_s": delay_s, "operation": operation, "killed": status == -signal.SIGKILL,
                          "status": status, "left": leftovers(directory / "out" / "state")}), flush=True)
    if status := in_fork(lambda: start(model, text, directory / "out", directory, 0)):
        sys.exit(f"the last start ended with {status}")


def start(model: Path, text: Path, out: Path, directory: Path, number: int, operation: int | None = None) -> None:
    """The run, from where it stands; now on one tier, now on another."""
    from ratel.train.states import StateDirectory
    from resume_common import train

    has_state = StateDirectory(out / "state").newest() is not None
    if operation is not None:
        die_at(operation)
    train(model, text, out, steps=STEPS, save_every=1, resume=has_state, overwrite=not has_state,
          ssd=[directory / "ssd"], tier=("ssd", "dram")[number % 2])


def die_at(count: int) -> None:
    """Kill this process just before or just after that operation, as if the power went."""
    left = [count]

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and count % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **options)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in OPERATIONS:
        setattr(os, name, wrapped(getattr(os, name)))


def in_fork(act: Callable[[], object], kill_after_s: float | None = None) -> int:
    """The exit status of a child that did it; negative: the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            act()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)  # ours, and not yet waited for: the number is nobody else's
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def leftovers(states: Path) -> list[str]:
    return sorted(entry.name for entry in states.iterdir()) if states.is_dir() else []


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
