"""Sessions with adapters of every kind, against peft with PyTorch's AdamW; over tiers, resumes and
micro-batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ratel.lora.adaptation import Adaptation
from ratel.lora.describe.config import LoraConfig
from ratel.lora.request import AdapterRequest
from ratel.runtime.planning.outline import Outline
from tests.lora.test_session import peft_of, rows_of, session_of, session_started, train_peft, written
from tests.support.lora import make, peft_tensors

pytestmark = pytest.mark.numerics
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
CASES: dict[str, tuple[str, LoraConfig]] = {
    "mixtral": ("mixtral", LoraConfig(rank=4, alpha=6)),
    "gpt_oss": ("gpt_oss", LoraConfig(rank=4, targets=("o_proj",), parameters=EXPERTS, rank_pattern={"down_proj": 5})),
    "routers": ("qwen3_moe", LoraConfig(rank=3, targets=(), parameters=("gate.weight", *EXPERTS))),
    "embedding": ("gemma3", LoraConfig(rank=4, targets=("embed_tokens", "v_proj"))),
    "positions": ("gpt2", LoraConfig(rank=4, targets=("wpe", "c_fc"))),
    "tied head": ("qwen3", LoraConfig(rank=4, targets=("lm_head", "q_proj"), tied=True)),
    "dora": ("llama", LoraConfig(rank=4, dora=True)),
    "dora of embeddings": ("gpt2", LoraConfig(rank=4, targets=("wpe", "c_attn", "c_fc"), dora=True)),
}


def train_tied_peft(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[float]:
    """An optimizer over all of peft's parameters would update what a head and an embedding share
    twice: by the gradient of each. Their sum belongs to it."""
    head, embedding = model.base_model.model.lm_head, model.base_model.model.get_input_embeddings()
    pairs = [(embedding.lora_embedding_A["default"], head.lora_B["default"].weight),
             (embedding.lora_embedding_B["default"], head.lora_A["default"].weight)]
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)
    return train_peft(model, batches, pairs)


@pytest.mark.parametrize("case", CASES)
def test_steps_are_pefts(tmp_path: Path, case: str) -> None:
    name, config = CASES[case]
    data = rows_of(10)
    with session_of(make(name), config) as session:
        first = written(session_started(session), tmp_path / "first")
        losses = [session.step(batch).loss for batch in data]
        trained = written(session, tmp_path / "last")
    reference = peft_of(name, tmp_path / "first")
    expected = (train_tied_peft if config.tied else train_peft)(reference, data)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=5e-6, atol=5e-6)
    for tensor_name, tensor in peft_tensors(reference).items():
        assert not torch.equal(trained[tensor_name], first[tensor_name]), tensor_name
        torch.testing.assert_close(trained[tensor_name], tensor, rtol=1e-4, atol=2e-5, msg=lambda text: f"{tensor_name}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_plans_know_them_without_weights(case: str) -> None:
    name, config = CASES[case]
    outline = Outline(make(name).config, dtype=torch.float32, max_seq_len=9,
                      additions=Adaptation(AdapterRequest(config=config, directory=None), seed=0, dtype=torch.float32))
    assert outline.micro_batch(2, 9).activation_bytes > 0
    with session_of(make(name), config) as session:
        trained = {unit.name: unit.num_trainable for unit in session_started(session).plan.spec.units}
    assert {unit.name: unit.num_trainable for unit in outline.spec.units} == trained
    outline.close()


def results(case: str, directory: Path, *, resumes: bool = False, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    name, config = CASES[case]
    data, losses = rows_of(4), []
    for number, part in enumerate((data[:2], data[2:]) if resumes else (data,)):
        with session_of(make(name), config, max_grad_norm=0.5, **options) as session:
            if number:
                session.load(directory / "state")
            losses += [session.step(batch).loss for batch in part]
            session.save(directory / "state")
            tensors = written(session, directory / "adapter")
    return losses, tensors


@pytest.mark.parametrize("case", ("mixtral", "gpt_oss", "tied head", "dora", "dora of embeddings"))
def test_where_a_base_lies_and_a_resume_change_no_bit(tmp_path: Path, case: str) -> None:
    expected = results(case, tmp_path)
    for options in (dict(tier="ssd", ssd=[tmp_path / "ssd"]), dict(tier="dram", resumes=True)):
        found = results(case, tmp_path, **options)
        assert found[0] == expected[0]
        assert all(torch.equal(tensor, expected[1][name]) for name, tensor in found[1].items())


@pytest.mark.parametrize("case", ("mixtral", "embedding", "dora"))
def test_sessions_in_bf16_learn(tmp_path: Path, case: str) -> None:
    name, config = CASES[case]
    batch = rows_of(1)[0]
    with session_of(make(name, torch.bfloat16), config, dtype="bf16", lr=3e-3) as session:
        first = written(session_started(session), tmp_path / "first")
        losses = [session.step(batch).loss for _ in range(12)]
        last = written(session, tmp_path / "last")
    assert losses[-1] < losses[0] - 0.05
    assert [own for own in last if torch.equal(first[own], last[own])] == []
