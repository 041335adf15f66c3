"""What importing and exporting take beside the arena is what plans set aside: four bytes for each
element of the largest unit."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ratel import models
from ratel.memory.resident import peak_bytes, reset_peak, resident_bytes, trim
from ratel.runtime.session.machinery import Machinery
from ratel.runtime.session.session import Session
from ratel.units import MIB

pytestmark = pytest.mark.e2e

ELEMENTS = 100_000 * 512
ROOM_BYTES = 4 * ELEMENTS + 96 * MIB
"""With pieces under way. As much again, which an eighth byte of each element would be, does not
fit."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100_000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
                                         num_attention_heads=8, tie_word_embeddings=True, max_position_embeddings=64))
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found[name] = tmp_path_factory.mktemp(name)
        model.to(dtype).save_pretrained(found[name])
    return found


def rise(action: Callable[[], object]) -> int:
    """Bytes by which the resident set grows at most."""
    trim()
    reset_peak()
    before = resident_bytes()
    assert peak_bytes() - before < 16 * MIB, "the kernel does not start the peak anew"
    action()
    return peak_bytes() - before


@pytest.fixture
def rises(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """By how much memory rises for whatever a session imports, with its arena there already."""
    found: list[int] = []

    def watched(importing: Callable[..., None]) -> Callable[..., None]:
        def run(self: Machinery, *arguments: object) -> None:
            self.arena.settle()
            found.append(rise(lambda: importing(self, *arguments)))

        return run

    for name in ("import_weights", "import_state"):
        monkeypatch.setattr(Machinery, name, watched(getattr(Machinery, name)))
    return found


@pytest.fixture
def session(ssd_dir: Path) -> Iterator[Callable[..., Session]]:
    opened: list[Session] = []

    def opened_from(source: Path, **options: object) -> Session:
        opened.append(Session(str(source), device="cpu", dtype="bf16", dram="4GiB", ssd=[ssd_dir], tier="ssd", **options))
        return opened[-1]

    yield opened_from
    for each in opened:
        each.close()


def test_fp32_weights_are_read_without_their_file_being_mapped(checkpoints: dict[str, Path]) -> None:
    parts = models.load(str(checkpoints["fp32"]), dtype=torch.bfloat16, device=torch.device("cpu"))
    (largest,) = (unit for unit in parts.spec.units if unit.num_elements >= ELEMENTS)

    def read() -> None:
        out = torch.empty(largest.num_elements)
        parts.stored.read_unit(largest, out)

    assert 3.9 * ELEMENTS < rise(read) < ROOM_BYTES and parts.stored.import_element_bytes == 4
    parts.close()


def test_what_a_session_imports_and_exports(checkpoints: dict[str, Path], session: Callable[..., Session], rises: list[int],
                                            tmp_path: Path) -> None:
    first = session(checkpoints["bf16"])
    plan = first.prepare(1, 16)
    assert plan.import_bytes == 4 * max(unit.num_elements for unit in plan.spec.units)
    first.step({"input_ids": torch.ones(1, 16, dtype=torch.long)})
    for options in (dict(dtype="bf16"), dict(dtype="fp32"), dict(dtype="bf16", optimizer=True)):
        assert rise(lambda: first.export(tmp_path / "out", **options)) < ROOM_BYTES, options
    assert rise(lambda: first.save(tmp_path / "state")) < 96 * MIB
    first.close()
    resumed = session(checkpoints["bf16"])
    resumed.load(tmp_path / "state")
    resumed.prepare(1, 16)
    from_files, from_state = rises
    assert from_files < 160 * MIB and from_state < ROOM_BYTES


def test_moments(checkpoints: dict[str, Path], session: Callable[..., Session], tmp_path: Path,
                 monkeypatch: pytest.MonkeyPatch) -> None:
    first = session(checkpoints["bf16"])
    first.prepare(1, 16)
    first.step({"input_ids": torch.ones(1, 16, dtype=torch.long)})
    first.export(tmp_path / "out", optimizer=True)
    first.close()
    found: list[int] = []
    from ratel.runtime.session import build

    import_weights, import_moments = Machinery.import_weights, build.import_moments

    def settled(self: Machinery, *arguments: object) -> None:
        import_weights(self, *arguments)
        self.arena.settle()

    monkeypatch.setattr(Machinery, "import_weights", settled)
    monkeypatch.setattr(build, "import_moments", lambda *arguments: found.append(rise(lambda: import_moments(*arguments))))
    session(checkpoints["bf16"], optimizer_state=tmp_path / "out").prepare(1, 16)
    assert len(found) == 1 and found[0] < ROOM_BYTES
