"""The check of one class: everything that Ratel promises of a model, one property after the
other."""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.runtime.session.session import Session
from ratel.verify.findings import BROKE, FAILED, HOLDS, SAID, Finding, Verdict, one_line
from ratel.verify.gradients import ROUNDING, Pass, compare, pass_of, session_options
from ratel.verify.loading import compare_loading
from ratel.verify.quiet import quiet
from ratel.verify.subject import HIGHEST, IGNORED, LENGTH, LOWEST, NEXT_TOKEN, ROWS, Batch, Loss, PlainError, Subject

PACKED_ROUNDING = 1e-4
"""Documents alone are matrices of other shapes, and sums in another order."""
SAME_LOSS = 1e-5


def check_class(model_class: type[nn.Module], config: Any, task: str, *, is_quick: bool = False) -> Verdict:
    """Everything about a class with a configuration that is small already
    (`ratel.models.checks.shrink`), on the CPU.

    ``is_quick``: gradients in fp32, causality and documents that share a row; not exports,
    resuming, bf16 and other losses.
    """
    begun = time.perf_counter()
    findings: tuple[Finding, ...] = ()
    refused = None
    with (tempfile.TemporaryDirectory(prefix="ratel-verify-") as base, torch.random.fork_rng(devices=[]), torch.enable_grad(),
          quiet()):
        try:
            subject = Subject(model_class, config, task, Path(base) / "model")
            findings = tuple((_check_quickly if is_quick else _check)(subject, Path(base)))
        except RatelError as error:
            refused = one_line(error)
        except PlainError as error:
            refused = f"transformers itself cannot run it on text alone: {error}"
    return Verdict(name=model_class.__name__, task=task, findings=findings, refused=refused,
                   seconds=time.perf_counter() - begun)


def _check(subject: Subject, base: Path) -> Iterator[Finding]:
    with _session(subject, torch.float32) as session:  # what is refused is refused here
        plain = _plain(subject, subject.task_loss, subject.batch())
        if subject.task == NEXT_TOKEN:
            yield _guarded("causal", lambda: _causal(subject, session))
        yield from _steps(subject, session, plain, base)
        isolates = session.parts.isolates_documents
    if subject.task == NEXT_TOKEN:
        yield _packed(subject, isolates)
        yield _guarded("loading", lambda: _loading(subject))
    yield _guarded("bf16", lambda: _bf16(subject, plain))
    yield _guarded("own loss", lambda: _own_loss(subject))


def _check_quickly(subject: Subject, base: Path) -> Iterator[Finding]:
    with _session(subject, torch.float32) as session:
        batch = subject.batch()
        plain = _plain(subject, subject.task_loss, batch)
        if subject.task == NEXT_TOKEN:
            yield _guarded("causal", lambda: _causal(subject, session))
        yield _guarded("gradients", lambda: compare("gradients", pass_of(session, batch), plain, _exact(
            subject, subject.task_loss, batch, plain), ROUNDING[torch.float32]))
        isolates = session.parts.isolates_documents
    if subject.task == NEXT_TOKEN:
        yield _packed(subject, isolates)


def _guarded(about: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except RatelError as error:
        return Finding(about=about, outcome=SAID, detail=f"refused: {one_line(error)}")
    except PlainError as error:
        return Finding(about=about, outcome=SAID, detail=f"transformers itself cannot: {error}")
    except Exception as error:  # whatever a model's code or ours raises is what was found
        return Finding(about=about, outcome=BROKE, detail=f"{type(error).__name__}: {one_line(error)}")


def _session(subject: Subject, dtype: torch.dtype) -> Session:
    return Session(str(subject.directory), task=subject.task, **session_options(dtype, ROWS))


def _plain(subject: Subject, loss: Loss, batch: Batch, dtype: torch.dtype = torch.float32) -> Pass:
    try:
        return subject.plain(loss, batch, dtype)
    except Exception as error:
        raise PlainError(f"{type(error).__name__}: {one_line(error, 160)}") from error


def _exact(subject: Subject, loss: Loss, batch: Batch, plain: Pass) -> Callable[[], Pass]:
    def run() -> Pass:
        try:
            return subject.plain(loss, batch, torch.float64)
        except (RuntimeError, ValueError, TypeError):  # some models name fp32 in their code
            return subject.rows_apart(loss, batch, plain)
    return run


def _causal(subject: Subject, session: Session) -> Finding:
    """The loss of the first half, with other tokens in the second, and with another one in the
    first."""
    batch, half = subject.batch(), LENGTH // 2
    batch["labels"] = torch.where(torch.arange(LENGTH) < half, batch["labels"], IGNORED)
    later, earlier = (batch["input_ids"].clone() for _ in range(2))
    span = min(HIGHEST, subject.vocab) - LOWEST
    later[:, half:] = (later[:, half:] - LOWEST + 7) % span + LOWEST
    earlier[:, 0] = (earlier[:, 0] - LOWEST + 7) % span + LOWEST
    losses = [session.evaluate([{**batch, "input_ids": ids}]) for ids in (batch["input_ids"], later, earlier)]
    change, check = (abs(loss - losses[0]) / abs(losses[0]) for loss in losses[1:])
    if not change <= SAME_LOSS:
        return Finding(about="causal", outcome=FAILED, detail=f"later tokens change the loss of earlier ones by {change:.1e}")
    if not check > 0:
        return Finding(about="causal", outcome=FAILED, detail="no token changes the loss of a later one")
    return Finding(about="causal", outcome=HOLDS)


def _steps(subject: Subject, session: Session, plain: Pass, base: Path) -> Iterator[Finding]:
    batches = [subject.batch(seed) for seed in (1, 2)]
    ours = pass_of(session, batches[0])
    yield compare("gradients", ours, plain, _exact(subject, subject.task_loss, batches[0], plain), ROUNDING[torch.float32])
    yield _moved(subject, session, ours)
    session.save(base / "state")
    second = session.step(batches[1]).loss
    straight = session.state_dict()
    with _session(subject, torch.float32) as resumed:
        resumed.load(base / "state")
        loss = resumed.step(batches[1]).loss
        state = resumed.state_dict()
        unlike = [name for name, tensor in straight.items() if not torch.equal(tensor, state[name])]
        is_same = loss == second and not unlike
        yield Finding(about="resume", outcome=HOLDS if is_same else FAILED,
                      detail="" if is_same else f"differs: {', '.join(unlike[:3]) or 'loss'}")
        yield _guarded("export", lambda: _export(subject, resumed, state, base / "export"))


def _moved(subject: Subject, session: Session, ours: Pass) -> Finding:
    before, after = subject.module().state_dict(), session.state_dict()
    wrong = [name for name, grad in ours.grads.items() if bool(grad.any()) is torch.equal(after[name], before[name].float())]
    wrong += [name for name in after if name not in ours.grads and not torch.equal(after[name].float(), before[name].float())]
    return Finding(about="step", outcome=FAILED if wrong else HOLDS, detail=", ".join(wrong[:3]))


def _export(subject: Subject, session: Session, trained: dict[str, Tensor], path: Path) -> Finding:
    """Everything in the state dict: what was trained as it is in the session, the rest as it
    was."""
    session.export(path, dtype="fp32")
    model_class = type(session.parts.module)
    back, info = model_class.from_pretrained(path, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    state = back.state_dict()
    given = subject.module().state_dict()
    wrong = sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})) or sorted(state.keys() ^ given.keys())
    wrong = wrong or [name for name in state if not torch.equal(state[name], trained.get(name, given[name]).to(state[name].dtype))
                      and name not in _aliases(session)]
    if wrong:
        return Finding(about="export", outcome=FAILED, detail=f"{len(wrong)} differ: {', '.join(wrong[:3])}")
    return Finding(about="export", outcome=HOLDS)


def _aliases(session: Session) -> set[str]:
    """Other names of tied parameters: compared under the first."""
    return {alias for unit in session.plan.spec.units for param in unit.params for alias in param.aliases}


def _packed(subject: Subject, isolates: bool) -> Finding:
    if not isolates:
        return Finding(about="packed", outcome=SAID, detail="one document a row")
    return _guarded("packed", lambda: _packed_beside_apart(subject))


def _packed_beside_apart(subject: Subject) -> Finding:
    packed, apart = subject.packed()
    loss = subject.apart_loss(apart)
    plain = _plain(subject, loss, packed)
    with _session(subject, torch.float32) as session:
        return compare("packed", pass_of(session, packed), plain, _exact(subject, loss, packed, plain), PACKED_ROUNDING)


def _loading(subject: Subject) -> Finding:
    differences = compare_loading(subject.directory)
    return Finding(about="loading", outcome=FAILED if differences else HOLDS, detail="; ".join(differences[:2]))


def _bf16(subject: Subject, exact: Pass) -> Finding:
    """Plain PyTorch's error is that of the batch at once or of its rows apart: a router may be in
    doubt in one of them."""
    batch = subject.batch()
    plain = _plain(subject, subject.task_loss, batch, torch.bfloat16)
    with _session(subject, torch.bfloat16) as session:
        ours = pass_of(session, batch)
    found = compare("bf16", ours, plain, lambda: exact, ROUNDING[torch.bfloat16])
    if found.outcome == FAILED:
        apart = subject.rows_apart(subject.task_loss, batch, plain, torch.bfloat16)
        again = compare("bf16", ours, apart, lambda: exact, ROUNDING[torch.bfloat16])
        return again if again.outcome == HOLDS else found
    return found


def _own_loss(subject: Subject) -> Finding:
    batch = subject.batch()
    plain = _plain(subject, subject.own_loss, batch)
    with Session(subject.module(), loss_fn=subject.own_loss, **session_options(torch.float32, ROWS)) as session:
        return compare("own loss", pass_of(session, batch), plain, _exact(subject, subject.own_loss, batch, plain),
                       ROUNDING[torch.float32])
