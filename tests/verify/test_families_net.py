"""A part of the net over all classes of transformers: some that together touch every mechanism, and
a sample of the others.

All of it is `python -m benchmarks.exactness.families`, which writes docs/families.md.
"""

import json
from pathlib import Path

import pytest

from ratel.verify.net import Entry, check_entry, entries

pytestmark = pytest.mark.numerics
ROOT = Path(__file__).resolve().parents[2]
FOUND = ROOT / "benchmarks" / "families.json"

REPRESENTATIVE = {
    "DeepseekV3ForCausalLM": "buffers in the state, latent attention, routing",
    "FalconMambaForCausalLM": "a recurrence",
    "GPT2LMHeadModel": "learned positions, transposed matrices",
    "Gemma3ForCausalLM": "two rotary types, windows",
    "GptOssForCausalLM": "sinks, windows, merged experts",
    "GraniteMoeForCausalLM": "use_cache in **kwargs",
    "JambaForCausalLM": "attention and recurrence in turns",
    "LlamaForSequenceClassification": "pooling of the last token",
    "MixtralForCausalLM": "experts stored one by one",
    "OPTForCausalLM": "positions that begin at 2",
    "Phi3ForCausalLM": "merged projections",
    "BertForMaskedLM": "a tied decoder with a bias",
    "BertForTokenClassification": "attention both ways",
}
EVERY = 40
"""One in so many of the other classes is checked."""


def sample() -> list[Entry]:
    every = entries()
    return [entry for number, entry in enumerate(every) if entry.name in REPRESENTATIVE or number % EVERY == 0]


def found() -> dict[Entry, dict]:
    return {Entry(name=v["name"], task=v["task"]): v for v in json.loads(FOUND.read_text())["verdicts"]}


def test_every_class_of_the_installed_transformers_is_in_the_table() -> None:
    new = [f"{entry.name} ({entry.task})" for entry in entries() if entry not in found()]
    assert not new, f"run python -m benchmarks.exactness.families --only {' '.join(name.split()[0] for name in new)}"


def test_every_class_of_the_table_is_trained_rightly_or_has_a_reason() -> None:
    wrong = [f"{v['name']} ({v['task']})" for v in found().values()
             if not v["refused"] and any(finding["outcome"] in ("failed", "broke") for finding in v["findings"])]
    assert not wrong
    assert sum(1 for v in found().values() if not v["refused"]) >= 150


@pytest.mark.timeout(300)
@pytest.mark.parametrize("entry", sample(), ids=lambda entry: f"{entry.name}-{entry.task}")
def test_a_class_is_trained_rightly_or_refused(entry: Entry) -> None:
    verdict = check_entry(entry)
    assert not verdict.failed, [finding.describe() for finding in verdict.failed]
    before = found()[entry]
    assert bool(verdict.refused) is bool(before["refused"]), verdict.refused or "is trained now: python -m benchmarks.exactness.families --only it"
