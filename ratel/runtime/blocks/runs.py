"""The two runs of a block in a training step: forward, which may keep inner activations, and the
one before backward.

What the second run can leave out is learned from a trace, once for every kind of block and every
form of its arguments. A kind whose operations depend on values (routing to experts one by one) is
always run again in full.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ratel.errors import RatelError
from ratel.models import Parts
from ratel.models.checks.second_run import refuse_unlike_runs
from ratel.models.parts import TRIAL_ERRORS
from ratel.models.structure.blocks import count_elements
from ratel.models.structure.inputs import BlockInputs, leaves
from ratel.planner.block_profile import BlockProfile
from ratel.runtime.blocks.kinds import Form, form_of, is_exact, kind_of
from ratel.runtime.blocks.profile import (guessed_profile, inner_numbers, kept_bytes, plain_profile,
                                          profile_of)
from ratel.runtime.blocks.compiled import CompiledBlocks
from ratel.runtime.blocks.op_trace import OpTrace, trace
from ratel.runtime.blocks.replay import Diverged, Program, Recorder, Save, replay
from ratel.runtime.blocks.spiller import Spiller

log = logging.getLogger(__name__)

ON_VALUES = "what it does depends on values"


class BlockRuns:
    """What has been learned about the blocks of one model. Not for use from two threads at once."""

    def __init__(self, parts: Parts, compiled: CompiledBlocks | None = None) -> None:
        self.parts = parts
        # What autograd saves in a block depends on which of its arguments need gradients.
        kinds = [(kind_of(block), parts.differentiable_arguments(i)) for i, block in enumerate(parts.blocks)]
        self._kinds = [kinds.index(kind) for kind in kinds]
        """The first block of its kind, for each block."""
        self._traces: dict[tuple[int, Form], OpTrace] = {}
        self._programs: dict[tuple, Program] = {}
        self._in_full: dict[int, str] = {}
        """Kinds whose second run leaves nothing out, and the first reason for it."""
        self._compiled = compiled
        self._is_compiled: dict[int, bool] = {}
        """Whether each kind is compiled, once it has been tried."""
        self._too_large: set[tuple[int, Form]] = set()
        """What there was no room to follow; run again in full, too."""
        self._kept: Sequence[dict[str, int]] = [{} for _ in self._kinds]
        self._recorded: dict[tuple[int, int], tuple[Program, dict[str, list[Any]]]] = {}
        """What forward kept by block and micro-batch, and the parts of it that are not worth
        moving."""
        self._spiller: Spiller | None = None

    # --- learning -----------------------------------------------------------------------------------------------

    @property
    def compiles(self) -> bool:
        return self._compiled is not None

    def first_alike(self, block: int) -> int:
        """The first block of the same kind."""
        return self._kinds[block]

    @property
    def first_of_each_kind(self) -> list[int]:
        return list(dict.fromkeys(self._kinds))

    def learn(self, block: int, hidden: Tensor, inputs: BlockInputs, seed: Callable[[], None]) -> None:
        """Trace the kind of this block with arguments of this form, on random hidden states. Once
        is enough.

        It is to be run again in full if other values make other operations, or if a second run that
        leaves things out is not exact (`is_exact`). Where blocks are to be compiled, it is tried.
        ``seed`` sets the random generators, always to the same state. Raises RatelError for a block
        that does not do the same when it runs again.
        """
        key = self._key(block, hidden, inputs)
        if key in self._traces or key in self._too_large:
            return
        self._refuse_unlike_runs(block, hidden, inputs, seed)
        inputs, leaf = inputs.with_leaves(), _random_like(hidden)
        try:
            with torch.enable_grad():
                found, again = (self._trace(block, values, inputs) for values in (_random_like(hidden), leaf))
                if not found.is_like(again):
                    self._run_in_full(block, ON_VALUES)
                elif not is_exact(found, self.parts.blocks[block], lambda: self.parts.block(block, leaf, inputs), seed):
                    self._run_in_full(block, "what it does cannot be followed")
        except torch.OutOfMemoryError:  # following takes more than running; whether that fits is measured next
            self._traces.pop(key, None)
            self._too_large.add(key)
        except TRIAL_ERRORS as error:  # code that does not run under a dispatch mode, or not on random values
            self._run_in_full(block, f"what it does cannot be traced ({type(error).__name__}: {error})")
        if self._compiled is not None:
            self._compile(block, leaf, inputs, seed)

    def _refuse_unlike_runs(self, block: int, hidden: Tensor, inputs: BlockInputs, seed: Callable[[], None]) -> None:
        try:
            refuse_unlike_runs(self.parts, block, torch.randn_like(hidden), inputs, seed)
        except (torch.OutOfMemoryError, RatelError) as error:
            if isinstance(error, RatelError):
                raise
        except TRIAL_ERRORS:  # not on random values; the first step compares real ones
            return

    def _compile(self, block: int, leaf: Tensor, inputs: BlockInputs, seed: Callable[[], None]) -> None:
        kind = self._kinds[block]
        if self._is_compiled.get(kind) is False:
            return
        why = ON_VALUES if self._in_full.get(kind) == ON_VALUES else self._compiled.why_not(block, leaf, inputs, seed)
        self._is_compiled[kind] = why is None
        if why is not None:
            log.warning("block %d and its like are not compiled: %s", block, why)

    def profile(self, block: int, hidden: Tensor, inputs: BlockInputs, rows: int) -> BlockProfile:
        """The profile of a block whose kind has been learned with arguments of this form, those of
        ``rows`` rows."""
        found = self._traces.get(self._key(block, hidden, inputs))
        if found is None:
            return guessed_profile(count_elements(self.parts.blocks[block]), hidden[..., 0].numel() // rows)
        return (plain_profile if self._runs_in_full(block) else profile_of)(found, rows)

    def fingerprint(self, block: int, hidden: Tensor, inputs: BlockInputs) -> str:
        """A digest of all that the time of both runs depends on, but for weights, values and
        processors."""
        kind, form = self._key(block, hidden, inputs)
        trace = self._traces.get((kind, form))
        ops = [str(op.func) for op in trace.ops] if trace is not None else None
        runs = (self._runs_in_full(block), self._is_compiled.get(kind, False), self._spiller is not None)
        facts = (kind_of(self.parts.blocks[block]), form, ops, runs, torch.are_deterministic_algorithms_enabled())
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def keep(self, kept: Sequence[dict[str, int]]) -> None:
        """Have forward keep these results from now on, by block: names, and the most bytes that
        each may take. What it has kept before is forgotten."""
        self._kept = kept
        self._recorded.clear()

    def spill_to(self, spiller: Spiller | None) -> None:
        """Have second runs give it what autograd saves from now on, and leave nothing out; None:
        what is saved stays."""
        self._spiller = spiller

    # --- running ------------------------------------------------------------------------------------------------

    def first(self, block: int, micro_batch: int, hidden: Tensor, inputs: BlockInputs, save: Save) -> Tensor:
        """Forward. What the block keeps is given to ``save`` while it runs."""
        key = self._key(block, hidden, inputs)
        is_traced = key in self._traces  # else it is learned in backward
        if not is_traced or not self._kept[block] or self._runs_in_full(block):
            return self.plain(block, hidden, inputs)
        program = self._program(key, self._kept[block])
        # With a graph, as in the second run: without one, attention leaves out what its backward
        # needs.
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            return self._record(block, micro_batch, leaf, inputs.with_leaves(), program, save).detach()

    def second(self, block: int, micro_batch: int, hidden: Tensor, inputs: BlockInputs, saved: dict[str, list[Tensor]],
               seed: Callable[[], None]) -> Tensor:
        """Run again with a graph for backward. ``saved``: what `first` gave to ``save``, by name.

        `finish` says that backward through it is over. Raises RatelError if the block does not do
        what it did in forward.
        """
        if self._spiller is not None:
            with self._spiller.saving(given_to(self.parts, block, hidden, inputs)):
                return self.parts.block(block, hidden, inputs)
        program, extras = self._recorded.pop((block, micro_batch), (None, {}))
        if program is not None:
            results = {name: saved[name] + extras[name] for name in extras}
            try:
                return self._replay(block, hidden, inputs, program, results)
            except Diverged as error:
                raise RatelError(f"block {block} did something else when it was run again for backward than in forward "
                                 f"({error}): its gradient would be wrong", field="model",
                                 remedy="Make its forward depend on its arguments and weights alone") from error
        key = self._key(block, hidden, inputs)
        if self._runs_in_full(block) or key in self._too_large:
            return self.plain(block, hidden, inputs)
        if key not in self._traces:
            return self._run_traced(block, hidden, inputs, keep_graph=True)
        try:
            return self._replay(block, hidden, inputs, self._program(key, {}), {})
        except Diverged as error:
            self._run_in_full(block, f"it did not do what it did before ({error})")
        seed()
        return self.parts.block(block, hidden, inputs)

    def plain(self, block: int, hidden: Tensor, inputs: BlockInputs) -> Tensor:
        """Run it, compiled if its kind is. Keeps nothing, leaves nothing out."""
        run = self._compiled.run if self._is_compiled.get(self._kinds[block]) else self.parts.block
        return run(block, hidden, inputs)

    def _runs_in_full(self, block: int) -> bool:
        return self._kinds[block] in self._in_full or self._is_compiled.get(self._kinds[block], False)

    def finish(self) -> None:
        """Backward has used what the last second run made for it."""
        if self._spiller is not None:
            self._spiller.finish()

    def _record(self, block: int, micro_batch: int, leaf: Tensor, inputs: BlockInputs, program: Program,
                save: Save) -> Tensor:
        recorder = Recorder(program, save)
        with saved_tensors_hooks(lambda tensor: None, lambda packed: packed), recorder:
            output = self.parts.block(block, leaf, inputs)
        if recorder.complete:
            self._recorded[block, micro_batch] = program, recorder.extras
        else:
            self._run_in_full(block, "it did not do what it did before")
        return output

    def _replay(self, block: int, hidden: Tensor, inputs: BlockInputs, program: Program,
                results: dict[str, list[Any]]) -> Tensor:
        if not program.saves_work:
            return self.parts.block(block, hidden, inputs)
        return replay(program, results, self.parts.blocks[block], lambda: self.parts.block(block, hidden, inputs))

    # --- what is known ------------------------------------------------------------------------------------------

    def _key(self, block: int, hidden: Tensor, inputs: BlockInputs) -> tuple[int, Form]:
        return self._kinds[block], form_of(hidden, inputs.calls[block])

    def _trace(self, block: int, leaf: Tensor, inputs: BlockInputs) -> OpTrace:
        self._run_traced(block, leaf, inputs, keep_graph=False)
        return self._traces[self._key(block, leaf, inputs)]

    def _run_traced(self, block: int, leaf: Tensor, inputs: BlockInputs, *, keep_graph: bool) -> Tensor:
        output, found = trace(lambda: self.parts.block(block, leaf, inputs), self.parts.blocks[block],
                              keep_graph=keep_graph)
        self._traces[self._key(block, leaf, inputs)] = found
        self._programs.clear()
        return output

    def _program(self, trace_key: tuple[int, Form], kept: dict[str, int]) -> Program:
        key = (*trace_key, tuple(kept.items()))
        if key not in self._programs:
            found = self._traces[trace_key]
            fitting = {name: number for name, number in inner_numbers(found).items()
                       if kept_bytes(found.ops[number]) <= kept.get(name, 0)}
            self._programs[key] = Program.make(found, fitting)
        return self._programs[key]

    def _run_in_full(self, block: int, reason: str) -> None:
        log.info("block %d and its like are run again in full for backward: %s", block, reason)
        self._in_full.setdefault(self._kinds[block], reason)


def given_to(parts: Parts, block: int, hidden: Tensor, inputs: BlockInputs) -> list[Tensor]:
    """Weights and arguments of a block: what stays where it is while the block runs."""
    module, call = parts.blocks[block], inputs.calls[block]
    arguments = (x for x in leaves((call.args, call.kwargs)) if isinstance(x, Tensor))
    return [hidden, *arguments, *module.parameters(), *module.buffers()]


def _random_like(hidden: Tensor) -> Tensor:
    return torch.randn_like(hidden).requires_grad_()
