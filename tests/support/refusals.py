"""Sessions that are refused something. No tests here."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ratel.errors import RatelError
from ratel.runtime.session.session import Session
from tests.support.families import batches, build, loss_fn_of


def opened(model: object, ssd: Path | None = None, **options: object) -> Session:
    return Session(model, **{"device": "cpu", "lr": 1e-3, "ssd": None if ssd is None else [ssd], **options})


def refused(message: str, field: str, call: Callable[[], object]) -> RatelError:
    with pytest.raises(RatelError, match=message) as caught:
        call()
    assert caught.value.field == field
    return caught.value


class Untouched:
    """The user's model, the directory and the threads are after a refusal what they were."""

    def __init__(self, directory: Path, family: str = "llama") -> None:
        self.directory, self.family, self.model = directory, family, build(family)
        self.state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.parameters = [(id(p), p.data_ptr()) for p in self.model.parameters()]
        self.threads = threading.active_count()

    def refuses(self, message: str, field: str, **options: object) -> RatelError:
        """At the first step, if not before. What is not closed until then is the module: it is a
        skeleton."""

        def attempt() -> None:
            with opened(self.model, self.directory, loss_fn=loss_fn_of(self.family), **options) as session:
                try:
                    session.step(batches(self.family, 1)[0])
                finally:
                    self.check_machine()

        error = refused(message, field, attempt)
        self.check()
        return error

    def check_machine(self) -> None:
        assert os.listdir(self.directory) == [] and threading.active_count() == self.threads

    def check(self) -> None:
        self.check_machine()
        now = self.model.state_dict()
        assert all(torch.equal(now[name], tensor) for name, tensor in self.state.items())
        assert [(id(p), p.data_ptr()) for p in self.model.parameters()] == self.parameters
