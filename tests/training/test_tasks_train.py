"""`ratel train --task` from a directory: against a plain loop over the same batches, exported,
resumed, refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ratel
from ratel.cli import main
from ratel.errors import RatelError
from ratel.runtime.states.saved_state import SavedState
from tests.support.tasks import WORDS, _AUTO, batch, directory, tokenizer

pytestmark = pytest.mark.e2e
STEPS, ROWS, LR = 6, 4, 1e-2


def data(path: Path, task: str) -> Path:
    lines = []
    for number in range(40):
        words = [WORDS[(number * 7 + place * place) % 20] for place in range(3 + number % 9)]
        lines.append({"tokens": words, "labels": ["A" if word in WORDS[:6] else "B" for word in words]} if task == "tokens" else
                     {"text": " ".join(words), "label": ["bad", "good", "so"][number % 3]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def train(model: Any, task: str, tmp_path: Path, out: str, **options: Any) -> Any:
    settings = {"steps": STEPS, "batch_size": ROWS, "seq_len": 32, "lr": LR, "warmup_steps": 0, "schedule": "constant",
                "device": "cpu", "dtype": "fp32", "quiet": True, "max_grad_norm": 0, "eval_fraction": 0.1, **options}
    return ratel.train(str(model), str(data(tmp_path / "data.jsonl", task)), task=task, out=str(tmp_path / out), **settings)


def exported(path: Path, task: str) -> Any:
    import transformers

    return getattr(transformers, _AUTO[task]).from_pretrained(path / "model").eval()


def started(family: str, task: str, tmp_path: Path, **changes: Any) -> tuple[Path, Any]:
    """A directory of the class, and the model in it as transformers loads it."""
    import transformers

    path = directory(tmp_path / "model", family, task, **changes)
    return path, getattr(transformers, _AUTO[task]).from_pretrained(path).train()


@pytest.mark.parametrize("family,task", [("bert", "classify"), ("distilbert", "tokens"), ("bert", "masked-lm"),
                                         ("llama", "classify")])
def test_a_run_is_a_plain_loop_over_its_batches(family: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {} if task == "masked-lm" else {"id2label": dict(enumerate(["A", "B", "C"] if task == "tokens" else ["bad", "good", "so"]))}
    path, reference = started(family, task, tmp_path, **named)
    seen: list[Any] = []
    step = ratel.Session.step

    def noting(self: ratel.Session, given: Any, **more: Any) -> Any:
        if "lr" in more:  # the run's own; a family that is new is tried out in sessions of its own
            seen.append(given)
        return step(self, given, **more)

    monkeypatch.setattr(ratel.Session, "step", noting)
    result = train(path, task, tmp_path, "out", micro_batch=2)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=LR, weight_decay=0.0)
    losses = []
    for given in seen:
        optimizer.zero_grad()
        loss = reference(**given).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert result.losses == pytest.approx(losses, rel=2e-4)
    assert losses[0] != pytest.approx(losses[-1], rel=1e-2)
    found = exported(tmp_path / "out", task)
    with torch.no_grad():
        probe = {name: tensor for name, tensor in batch(task, 0).items() if name != "labels"}
        probe["input_ids"] = probe["input_ids"] % len(tokenizer())
        torch.testing.assert_close(found(**probe).logits, reference.eval()(**probe).logits, rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("task", ["classify", "tokens", "masked-lm"])
def test_a_base_directory_gets_a_head_from_the_seed(task: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = directory(tmp_path / "model", "bert", None)
    first, second, other = (train(path, task, tmp_path, f"out{n}", seed=seed, eval_fraction=0) for n, seed in enumerate((1, 1, 2)))
    assert first.losses == second.losses != other.losses
    assert any("initialised from the seed" in record.message for record in caplog.records)
    written = json.loads((first.out / "model" / "config.json").read_text())
    if task != "masked-lm":
        names = {"classify": ["bad", "good", "so"], "tokens": ["A", "B"]}[task]
        assert written["id2label"] == {str(n): name for n, name in enumerate(names)}
        assert written["label2id"] == {name: n for n, name in enumerate(names)}
    assert type(exported(first.out, task)).__name__ == written["architectures"][0]


def test_the_body_of_a_base_directory_is_read_and_a_whole_one_is_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = directory(tmp_path / "model", "bert", None)
    result = train(path, "classify", tmp_path, "out", lr=1e-12, steps=1)
    trained, given = exported(result.out, "classify").state_dict(), load_file(path / "model.safetensors")
    assert given and all(torch.allclose(trained[f"bert.{name}"], tensor, atol=1e-9) for name, tensor in given.items())
    given.pop("encoder.layer.1.output.dense.weight")
    save_file(given, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RatelError, match="lack .*encoder.layer.1.output.dense.weight"):
        train(path, "classify", tmp_path, "out2")


def test_a_classifier_without_its_head_is_incomplete(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = directory(tmp_path / "model", "bert", "classify", id2label={0: "bad", 1: "good", 2: "so"})
    given = load_file(path / "model.safetensors")
    given.pop("classifier.weight")
    save_file(given, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RatelError, match="lack classifier.weight"):
        train(path, "classify", tmp_path, "out")


@pytest.mark.parametrize("task", ["classify", "tokens", "masked-lm"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(task: str, tmp_path: Path) -> None:
    path = directory(tmp_path / "model", "bert", None, hidden_dropout_prob=0.1)
    straight = train(path, task, tmp_path, "straight", save_every=3)
    train(path, task, tmp_path, "parts", save_every=3, steps=3)
    resumed = ratel.train(str(path), str(tmp_path / "data.jsonl"), out=str(tmp_path / "parts"), resume=True, steps=STEPS)
    assert resumed.losses == straight.losses
    a, b = (exported(run.out, task).state_dict() for run in (straight, resumed))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_state_is_exported_with_its_labels(tmp_path: Path) -> None:
    path = directory(tmp_path / "model", "bert", None)
    result = train(path, "classify", tmp_path, "out", save_every=STEPS)
    main(["export", "--state", str(result.out), "--out", str(tmp_path / "again" / "model"), "--model", str(path)])
    a, b = exported(result.out, "classify"), exported(tmp_path / "again", "classify")
    assert a.config.id2label == b.config.id2label == {0: "bad", 1: "good", 2: "so"}
    assert all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())
    assert SavedState(next((result.out / "state").iterdir())).training["task"]["labels"] == ["bad", "good", "so"]


def test_a_decoder_is_exported_with_the_padding_that_it_was_trained_with(tmp_path: Path) -> None:
    path = directory(tmp_path / "model", "llama", None)
    settings = json.loads((path / "config.json").read_text())
    settings["pad_token_id"] = None
    (path / "config.json").write_text(json.dumps(settings))
    result = train(path, "classify", tmp_path, "out")
    assert exported(result.out, "classify").config.pad_token_id == tokenizer().pad_token_id


def test_evaluations_say_how_many_labels_are_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = directory(tmp_path / "model", "bert", None)
    result = train(path, "classify", tmp_path, "out", quiet=False, steps=60)
    last = json.loads((result.out / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["eval_accuracy"] <= 1
    assert f"accuracy {last['eval_accuracy']:.1%}" in capsys.readouterr().out


def test_sequences_are_no_longer_than_the_model_handles(tmp_path: Path) -> None:
    path = directory(tmp_path / "model", "roberta", None)  # 66 positions, of which the first two are never used
    result = train(path, "masked-lm", tmp_path, "out", seq_len=1024, steps=1)
    assert json.loads((result.out / "config.json").read_text())["seq_len"] == 64


def test_batches_of_ones_own_have_a_task_too(tmp_path: Path) -> None:
    path = directory(tmp_path / "model", "bert", "classify")
    given = [batch("classify", 0, seed) for seed in range(3)]
    result = ratel.train(str(path), given, eval_data=given[:1], task="classify", steps=4, out=str(tmp_path / "out"), device="cpu",
                         dtype="fp32", quiet=True)
    assert result.eval_losses and result.tokens == 4 * 32


@pytest.mark.parametrize("is_module", [True, False])
def test_what_batches_show_a_classifier_to_be_is_exported(is_module: bool, tmp_path: Path) -> None:
    """Servers choose between softmax and sigmoid by it."""
    path, module = started("bert", "classify", tmp_path)
    given = batch("classify", 0)
    given["labels"] = torch.eye(4, 3)
    with ratel.Session(module if is_module else str(path), task="classify", device="cpu", dtype="fp32") as session:
        session.step(given)
        session.export(tmp_path / "out" / "model")
    assert json.loads((path / "config.json").read_text()).get("problem_type") is None
    assert exported(tmp_path / "out", "classify").config.problem_type == "multi_label_classification"


def test_words_keep_the_space_before_them(tmp_path: Path) -> None:
    """Byte-level tokenizers join a space to the word after it; words that come one by one have
    none."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, RobertaTokenizer

    path, words = directory(tmp_path / "model", "roberta", None, vocab_size=320), ["good", "film"]
    (path / "tokenizer.json").unlink()
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.train_from_iterator(["good film, good film"], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    trained = json.loads(bare.to_str())["model"]
    own = RobertaTokenizer(vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]])
    own.save_pretrained(path)
    result = train(path, "tokens", tmp_path, "out", save_every=STEPS)
    main(["export", "--state", str(result.out), "--out", str(tmp_path / "again"), "--model", str(path)])
    for made in (result.out / "model", tmp_path / "again"):
        found = AutoTokenizer.from_pretrained(made)
        assert found(words, is_split_into_words=True)["input_ids"] == own(" good film")["input_ids"]
