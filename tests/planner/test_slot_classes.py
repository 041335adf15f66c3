"""Which units take turns in the same slots: derived from the stages, so that no stage waits for a
slot that it holds itself."""

from dataclasses import replace
from pathlib import Path

import pytest

from ratel.models import parts as parts_module
from ratel.models.structure.unit_layout import Layout, make_layout
from ratel.planner.forecast.cost import predict
from ratel.planner.forecast.simulate import simulate
from ratel.planner.machine.hardware import load_hardware
from ratel.planner.schedule import unit_gathers
from ratel.planner.shape import ModelSpec, ParamSpec, SlotClass, StageSpec, lay_out, outside_blocks
from tests.runtime.streams.test_concurrency import train
from tests.support.families import batches
from tests.support.plans import gpt_spec, make_plan, tied_spec
from tests.support.sessions import SMALL, assert_same, open_session

pytestmark = pytest.mark.numerics


def two_units_a_block(num_blocks: int, hidden: int = 256) -> ModelSpec:
    """Each block has a large frozen unit and a small trained one; so has what comes before the
    blocks."""
    units, stages = [], []
    for index, kind in enumerate(["pre", *["block"] * num_blocks, "post"]):
        base = lay_out(len(units), f"{kind}.{index}", kind, [ParamSpec(name=f"{index}.w", shape=(hidden, 4 * hidden), trainable=False)])
        small = lay_out(len(units) + 1, f"{kind}.{index}.small", kind, [ParamSpec(name=f"{index}.a", shape=(16, hidden))])
        units += [base, small]
        stages.append(StageSpec(index=index, name=base.name, kind=kind, units=(base.index, small.index)))
    return ModelSpec(name="two", units=tuple(units), stages=tuple(stages), hidden_size=hidden, vocab_size=1000)


def test_what_stages_use_one_of_has_three_classes() -> None:
    spec = tied_spec(3, 64)
    assert [cls.name for cls in spec.classes] == ["ends", "block", "block", "block", "ends", "shared"]
    assert spec.slot_classes == (SlotClass("block", True), SlotClass("ends", False), SlotClass("shared", False))
    assert outside_blocks(spec) == ("ends", "shared") and outside_blocks(gpt_spec(2, 64, 100)) == ("ends",)


def test_the_second_unit_of_a_stage_has_slots_of_its_own() -> None:
    spec = two_units_a_block(4)
    assert [cls.name for cls in spec.slot_classes] == ["block", "block 2", "ends", "ends 2"]
    for stage in spec.stages:
        assert len({spec.classes[unit] for unit in stage.units}) == len(stage.units)
    kept = replace(spec, units=tuple(replace(u, fp32="small" in u.name) for u in spec.units))
    assert [cls.name for cls in kept.slot_classes] == ["block", "ends"], "what stays on the GPU waits for nobody"


@pytest.mark.parametrize("placement", ["ssd", "dram", {"*": "ssd", "*.small": "gpu"}], ids=str)
@pytest.mark.parametrize("optimizer", ["eager", "deferred"])
def test_a_step_of_unlike_units_comes_to_its_end(placement: "str | dict", optimizer: str) -> None:
    """In the closed form and in the simulator, which wait for slots as a step does; and both say
    about the same."""
    plan = make_plan(two_units_a_block(12, 1024), placement, optimizer=optimizer, checkpoints="gpu")
    hardware = load_hardware("h200-box")
    assert len(unit_gathers(plan, training=True)) >= sum(not p.on_gpu for p in plan.placements)
    predicted = predict(plan, hardware)
    assert simulate(plan, hardware).step_s == pytest.approx(predicted.step_s, rel=0.25)
    held = {g.unit for _, g in unit_gathers(plan, training=True) if g.uses > 1 and plan.spec.units[g.unit].kind == "block"}
    streamed = [cls for cls in plan.spec.slot_classes if cls.is_deep and plan.streamed(cls.name)]
    assert {plan.spec.classes[unit] for unit in held} == set(streamed), "each class keeps its last units over the turn"


@pytest.mark.parametrize("options", [
    dict(tier="ssd", buffers=SMALL), dict(tier="dram"), dict(placement={"*": "ssd", "*.mlp": "dram"}),
    dict(tier="ssd", optimizer="eager", max_grad_norm=0.0, buffers=SMALL), dict(tier="ssd", optimizer="speculative", max_grad_norm=100.0),
], ids=str)
def test_a_stage_with_two_units_trains_as_with_one(options: dict, ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = batches("llama", 3)
    with open_session(ssd_dir, tier="dram", max_grad_norm=options.get("max_grad_norm", 1.0)) as session:
        expected = train(session, steps)
    monkeypatch.setattr(parts_module, "make_layout", lambda *args: _with_mlps_apart(make_layout(*args)))
    with open_session(ssd_dir, **options) as session:
        assert_same(train(session, steps), expected)
        assert [cls.name for cls in session.plan.spec.slot_classes if cls.is_deep] == ["block", "block 2"]


def _with_mlps_apart(layout: Layout) -> Layout:
    units, indices = [], {}
    for unit in layout.spec.units:
        mlp = [p for p in unit.params if ".mlp." in p.name]
        rest = [p for p in unit.params if p not in mlp]
        for name, params in ((unit.name, rest), (f"{unit.name}.mlp", mlp)):
            if params:
                indices.setdefault(unit.index, []).append(len(units))
                units.append(lay_out(len(units), name, unit.kind, params))
    stages = tuple(replace(stage, units=tuple(new for unit in stage.units for new in indices[unit])) for stage in layout.spec.stages)
    return replace(layout, spec=replace(layout.spec, units=tuple(units), stages=stages))
