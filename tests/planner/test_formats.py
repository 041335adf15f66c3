"""The table of planes: what it says of today's states, and that all who count bytes ask it."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from ratel.errors import RatelError
from ratel.config.table import STATES
from ratel.planner.formats import (BF16, EXACT, FORMATS, FP32, FROZEN, MOMENT8, MOMENT_BLOCK, PLANES, ROOT8, TRAINED,
                                   Encoding)
from ratel.planner.shape import PARAM_ALIGN, ParamSpec, lay_out
from ratel.planner.traffic import step_traffic
from ratel.planner.work import Buffers
from ratel.runtime.states.format import MANIFEST, formats_of
from ratel.runtime.updates.arithmetic import UPDATES
from ratel.store.encodings import DTYPES
from tests.runtime.streams.test_concurrency import open_session
from tests.support.families import batches
from tests.support.plans import make_plan, tied_spec

pytestmark = pytest.mark.unit
HALVES = {"*": {"hi": "ssd", "lo": "ssd", "m": "ssd", "v": "ssd", "g": "dram"}}
SHORT, NARROW = FORMATS["bf16"], FORMATS["8bit"]


def test_states_take_what_the_documents_say() -> None:
    assert [(f.trained_bytes, f.update_bytes) for f in EXACT.values()] == [(14, 26), (16, 28)]
    assert [(f.trained_bytes, f.update_bytes) for f in SHORT.values()] == [(10, 18), (12, 20)]
    assert [(f.trained_bytes, f.update_bytes) for f in NARROW.values()] == [(8.0625, 14.125), (10.0625, 16.125)]
    assert [f.gathered for f in EXACT.values()] == [("hi",), ("hi", "lo")]
    assert PLANES == ("hi", "lo", "m", "v") == EXACT["fp32"].planes


def test_frozen_elements_have_the_planes_that_are_computed_with() -> None:
    unit = lay_out(0, "u", "block", [ParamSpec(name="a", shape=(4096,)), ParamSpec(name="b", shape=(8192,), trainable=False)])
    for name, table in EXACT.items():
        assert {p: table.num_elements(unit, p) for p in (*table.planes, "g")} == {
            "hi": 12288, "lo": 12288 if name == "fp32" else 4096, "m": 4096, "v": 4096, "g": 4096}
    assert EXACT["bf16"].num_bytes(replace(unit, fp32=True), "g") == 4 * 4096, "a unit that computes in fp32"


def test_every_name_in_the_table_has_its_code() -> None:
    assert STATES == tuple(FORMATS)
    for name, table in ((name, table) for name, tables in FORMATS.items() for table in tables.values()):
        assert table.update in UPDATES and table.name == name and table.planes == PLANES
        for row in table.rows:
            assert DTYPES[row.encoding.name].itemsize * 8 == row.encoding.bits and set(row.segments) <= {TRAINED, FROZEN}
    assert formats_of({}) == EXACT["bf16"] and formats_of({"formats": "exact"}) == EXACT["bf16"]
    unit = replace(lay_out(0, "u", "block", [ParamSpec(name="a", shape=(4096,))]), fp32=True)
    assert SHORT["bf16"].of(unit) is SHORT["fp32"]


def test_a_state_in_formats_of_tomorrow_is_refused(ssd_dir: Path, tmp_path: Path) -> None:
    """Its manifest says which, and its bytes would be read as other numbers."""
    with open_session(ssd_dir) as session:
        session.step(batches("llama", 1)[0])
        session.save(tmp_path / "state")
    manifest = json.loads((tmp_path / "state" / MANIFEST).read_bytes())
    assert "formats" not in manifest and manifest["version"] == 3
    name_formats(tmp_path / "state", "of tomorrow")
    with open_session(ssd_dir) as session, pytest.raises(RatelError, match="does not know: 'of tomorrow'"):
        session.load(tmp_path / "state")


def name_formats(state: Path, name: str) -> None:
    manifest = {**json.loads((state / MANIFEST).read_bytes()), "formats": name}
    del manifest["seal"]
    (state / MANIFEST).write_text(json.dumps({**manifest, "seal": zlib.crc32(json.dumps(manifest).encode())}))


def test_scales_lie_with_their_block() -> None:
    eight = Encoding(name="int8", bits=8, block=256, scale_bytes=4)
    assert [eight.num_bytes(count) for count in (256, 512, 513)] == [260, 520, 513 + 12]
    assert Encoding(name="nf4", bits=4, block=64, scale_bytes=4).num_bytes(1 << 20) == (1 << 19) + (1 << 16)
    assert [eight.place(512), eight.count(520)] == [520, 512] and [FP32.place(512), FP32.count(512)] == [512, 512]
    for encoding in (eight, MOMENT8, ROOT8, FP32, BF16):
        assert encoding.num_bytes(encoding.page_elements) % 4096 == 0 and encoding.page_elements % encoding.block == 0
    assert [tables["bf16"].page_elements for tables in FORMATS.values()] == [2048, 2048, 1 << 17]
    assert PARAM_ALIGN % MOMENT_BLOCK == 0, "no two parameters share a block"


def test_chunks_and_pieces_begin_at_pages() -> None:
    for formats in (SHORT["bf16"], NARROW["bf16"]):
        plan = replace(make_plan(tied_spec(2, 1024), HALVES, optimizer="deferred", buffers=Buffers(chunk_elements=6144)), formats=formats)
        for unit in plan.spec.units:
            assert plan.chunk_of(unit) == unit.num_trainable or plan.chunk_of(unit) % formats.page_elements == 0
        assert plan.piece_elements % formats.page_elements == 0 and plan.chunk_of(plan.spec.units[1]) >= 6144


def test_other_formats_are_counted_by_all() -> None:
    """Moments of half the size: 8 bytes a parameter instead of 12, and 18 moved in a step instead
    of 26."""
    plan = make_plan(tied_spec(40, 1024), HALVES, optimizer="deferred", buffers=Buffers(chunk_elements=1 << 18))
    short = replace(plan, formats=SHORT["bf16"])

    def spared(of: str) -> float:
        return (getattr(plan, of) - getattr(short, of)) / plan.spec.num_params

    assert spared("state_bytes") == spared("ssd_bytes") == spared("save_bytes") == pytest.approx(4, rel=1e-3)
    assert (plan.ring_slot_bytes - short.ring_slot_bytes, plan.ring_slot_bytes) == (4 << 18, 10 << 18)
    assert step_traffic(plan).ssd_bytes - step_traffic(short).ssd_bytes == pytest.approx(8 * plan.spec.num_params, rel=1e-3)
    assert short.formats.update_bytes == 18
    assert replace(short, durable="step").slot_layout.num_bytes == short.slot_layout.num_bytes

