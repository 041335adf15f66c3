"""A block runs twice in a step. Whatever its second run would meet that the first did not is
switched off or refused by name; what is trained has the gradients of autograd."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ratel
from ratel.errors import RatelError
from ratel.models import load
from ratel.models.calls.caches import Caches
from ratel.runtime.session.preparing import ready_for
from tests.support.models import CPU
from tests.support.second_runs import WIDTH, Block, Body, assert_gradients_equal, batch, loss_fn, session_gradients

pytestmark = pytest.mark.numerics
SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
NOT_GIVEN = "uses something computed before it that is not among its arguments"


def ids(rows: int = 4) -> Tensor:
    return torch.randint(3, 96, (rows, 12), generator=torch.Generator().manual_seed(1))


# --- caches -----------------------------------------------------------------------------------------------------------


def token_classifier() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    return transformers.Qwen3ForTokenClassification(transformers.Qwen3Config(**SIZES, head_dim=8, num_labels=3, classifier_dropout=0.0)).float()


def token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss


def test_a_decoder_with_a_loss_of_ones_own_makes_no_cache() -> None:
    batch = {"input_ids": ids(), "labels": ids() % 3}
    plain = token_classifier().train()
    token_loss(plain, batch).backward()
    assert_gradients_equal(session_gradients(token_classifier(), batch, loss_fn=token_loss), plain)


@pytest.mark.parametrize("name", ["GraniteMoe", "GraniteMoeShared"])
def test_a_cache_that_hides_in_further_arguments_is_off(name: str, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES, num_local_experts=4, num_experts_per_tok=2,
                                                    shared_intermediate_size=16)
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.save_pretrained(tmp_path)
    plain.train()(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    assert_gradients_equal(session_gradients(tmp_path, {"input_ids": ids()}), plain)


def nested() -> nn.Module:
    import transformers

    model = token_classifier()
    model.config.extra_config = transformers.LlamaConfig(use_cache=True)
    model.model.config = transformers.Qwen3Config(use_cache=True)
    return model


def test_every_configuration_says_so_until_the_session_is_closed(tmp_path: Path) -> None:
    model = nested()
    configs = (model.config, model.config.extra_config, model.model.config)
    parts = load(model, dtype=torch.float32, device=CPU, loss_fn=token_loss)
    assert [config.use_cache for config in configs] == [False] * 3
    parts.stored.write_beside(tmp_path, torch.float32)
    assert '"use_cache": true' in (tmp_path / "config.json").read_text() and not model.config.use_cache
    parts.close()
    assert [config.use_cache for config in configs] == [True] * 3


def refused(match: str, model: nn.Module, loss_fn: Callable, batch: dict[str, Tensor], **options: Any) -> RatelError:
    with pytest.raises(RatelError, match=match) as caught, ratel.Session(
            model, loss_fn=loss_fn, dtype="fp32", device="cpu", **options) as session:
        session.step(batch)
    assert "\n" not in str(caught.value) and caught.value.remedy
    return caught.value


def test_a_cache_that_is_asked_for_is_refused() -> None:
    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=True).loss

    error = refused("cache of keys and values", token_classifier(), loss_fn, {"input_ids": ids(), "labels": ids() % 3})
    assert "DynamicCache" in str(error.value) and "use_cache=False" in str(error.remedy)


def test_a_switch_that_is_not_thrown_leaves_the_cache_to_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Caches, "_switch_off", lambda self: None)
    refused("cache of keys and values", token_classifier(), token_loss, {"input_ids": ids(), "labels": ids() % 3})


# --- modules of one's own -------------------------------------------------------------------------------------------


def own_cache(block: Block, x: Tensor, _: Any) -> Tensor:
    """Attends to what the runs before have left."""
    block.seen = torch.cat([getattr(block, "seen", x[:, :0]), x.detach()], 1)
    return x + (x @ block.seen.transpose(1, 2)).softmax(-1) @ block.seen


def counts(block: Block, x: Tensor, _: Any) -> Tensor:
    block.calls = getattr(block, "calls", 0) + 1
    return x if block.calls < 1000 else 2 * x


def warms_up(block: Block, x: Tensor, _: Any) -> Tensor:
    """Does something else from its second call on, by an object that its attribute refers to."""
    block.memory = getattr(block, "memory", None) or Recorder()
    block.memory.seen.append(x.shape[0])
    return x if len(block.memory.seen) == 1 else 2 * x


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Any] = []


@pytest.mark.parametrize("extra, name", [(own_cache, "seen"), (counts, "calls"), (warms_up, "memory")])
def test_a_block_that_remembers_its_runs_is_refused(extra: Callable, name: str) -> None:
    error = refused("changes it every time", Body(extra), loss_fn, batch())
    assert error.value == f"{name} of Block"


def appends(block: Block, x: Tensor, state: Any) -> Tensor:
    state.append(float(x.shape[0]))
    return x


def records(block: Block, x: Tensor, state: Recorder) -> Tensor:
    state.seen.append(x.detach())
    return x


def shares_keys(block: Block, x: Tensor, state: dict[str, Tensor]) -> Tensor:
    state.setdefault("keys", x)
    return x


def writes_hidden(block: Block, x: Tensor, hidden: Tensor) -> Tensor:
    hidden.mul_(2)
    return x


def writes_mask(block: Block, x: Tensor, state: Tensor) -> Tensor:
    state[0] += 1
    return x


def replaces(block: Block, x: Tensor, state: list[Tensor]) -> Tensor:
    state[0] = state[0] * 2
    return x


@pytest.mark.parametrize("extra, make_state, name", [
    (appends, lambda x: [], "state (list)"), (records, lambda x: Recorder(), "state (Recorder)"),
    (shares_keys, lambda x: {}, "state (dict)"), (writes_hidden, lambda x: None, "hidden (Tensor)"),
    (writes_mask, lambda x: torch.zeros(3), "state (Tensor)"), (replaces, lambda x: [torch.ones(2)], "state (list)"),
], ids=lambda value: getattr(value, "__name__", None))
def test_a_block_that_changes_what_it_is_given_is_refused(extra: Callable, make_state: Callable, name: str) -> None:
    error = refused("changes what it is given", Body(extra, make_state), loss_fn, batch())
    assert error.value == name


def writes_unseen(block: Block, x: Tensor, hidden: Tensor) -> Tensor:
    hidden.data.mul_(2)  # counts as no write in PyTorch's books
    return x


def test_a_write_that_no_counter_shows_is_found_in_the_values() -> None:
    assert refused("changes what it is given", Body(writes_unseen), loss_fn, batch()).value == "hidden (Tensor)"


SHARED: dict[Any, Any] = {}


@pytest.fixture
def shared() -> Iterator[dict[Any, Any]]:
    SHARED.clear()
    yield SHARED
    SHARED.clear()


def reads_the_block_before(block: Block, x: Tensor, _: Any) -> Tensor:
    SHARED[block.layer_idx] = x.detach()
    return x + SHARED.get(block.layer_idx - 1, 0)


def test_numbers_handed_on_beside_the_hidden_states_are_refused(shared: dict) -> None:
    refused(NOT_GIVEN, Body(reads_the_block_before), loss_fn, batch())


def left_by_the_model(x: Tensor) -> None:
    SHARED["mask"] = (x.detach() > 0).float()


def finds_a_mask(block: Block, x: Tensor, _: Any) -> Tensor:
    return x * SHARED["mask"]


def test_a_mask_that_blocks_find_somewhere_is_refused(shared: dict) -> None:
    refused(NOT_GIVEN, Body(finds_a_mask, left_by_the_model), loss_fn, batch())


def uses_a_table(block: Block, x: Tensor, _: Any) -> Tensor:
    """Made by whoever needs it first, and then the same for all."""
    if "table" not in SHARED:
        SHARED["table"] = torch.linspace(0, 1, WIDTH)
    block.last_size = x.shape[1]
    return x + SHARED["table"]


def test_what_stays_the_same_from_run_to_run_is_trained(shared: dict) -> None:
    plain = Body(uses_a_table)
    loss_fn(plain, batch()).backward()
    assert_gradients_equal(session_gradients(Body(uses_a_table), batch(), loss_fn=loss_fn), plain)


class Detached(Body):
    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        return result * (1 + SHARED[1].mean())


def test_a_result_that_takes_more_from_blocks_is_refused_without_a_gradient_too(shared: dict) -> None:
    def leaves_its_output(block: Block, x: Tensor, _: Any) -> Tensor:
        SHARED[block.layer_idx] = x.detach() * 2
        return x

    refused("more of a block's output than the hidden states", Detached(leaves_its_output), loss_fn, batch())


def fifth_run(block: Block, x: Tensor, _: Any) -> Tensor:
    """A global of Python that nobody sees, in a block that behaves while it is tried."""
    SHARED["runs"] = SHARED.get("runs", 0) + 1
    return x if SHARED["runs"] < SHARED["limit"] else 2 * x


def test_a_second_run_that_differs_is_refused_before_the_plan(shared: dict) -> None:
    shared["limit"] = 10**9
    parts = load(Body(fifth_run), dtype=torch.float32, device=CPU, loss_fn=loss_fn)
    parts.probe(batch())
    parts.close()
    shared["limit"] = 2 * shared["runs"] + 2  # the same trace again, and one run of the first block
    with ratel.Session(Body(fifth_run), loss_fn=loss_fn, dtype="fp32", device="cpu") as session:
        with pytest.raises(RatelError, match="block 0 did something else when it was run again"):
            ready_for(session._core, batch())


def test_the_first_step_compares_both_runs(shared: dict) -> None:
    shared["limit"] = 10**9
    with ratel.Session(Body(fifth_run), loss_fn=loss_fn, dtype="fp32", device="cpu") as session:
        ready_for(session._core, batch())
        shared["limit"] = shared["runs"] + 4  # three blocks run in forward
        with pytest.raises(RatelError, match="block 2 did something else when it was run again"):
            session.step(batch())


class Counts(Body):
    """Before the blocks, so that no block shows it."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x * (1 if self.calls < 1000 else 2))


def test_a_model_that_counts_its_calls_is_refused() -> None:
    assert refused("its forward changes it every time", Counts(None), loss_fn, batch()).value == "calls of Counts"


class Scales(Body):
    """Leaves a number of the batch's in its blocks."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            layer.scale = float(x.abs().max())
        return super().forward(x)


def test_numbers_of_one_batch_that_are_left_in_blocks_are_refused() -> None:
    error = refused("leaves in them a number", Scales(lambda block, x, _: x * block.scale), loss_fn, batch(), micro_batch=2)
    assert error.value == "blocks 0.scale"


def test_dropout_is_the_same_in_both_runs() -> None:
    model = Body(lambda block, x, _: F.dropout(x, 0.3, block.training))
    with ratel.Session(model, loss_fn=loss_fn, dtype="fp32", device="cpu") as session:
        assert session.step(batch()).loss > 0
