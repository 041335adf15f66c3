"""What runs cost: lengths and padding, constants out of measured points, prices, and that more of
anything never costs less."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from ratel.errors import RatelError
from ratel.planner.forecast.cost import predict
from ratel.planner.machine.hardware import load_hardware, machine_names
from ratel.planner.pricing.calibration import StepWork, calibrate, read_measured, step_work
from ratel.planner.pricing.cost_text import describe_costs
from ratel.planner.pricing.fit import Points, UndeterminedError, fit, left_out_errors
from ratel.planner.pricing.lengths import Lengths
from ratel.planner.pricing.rented import TABLE, Price, Rented, read_table, rented
from ratel.planner.pricing.run_cost import PACKED, PADDED, Epoch, RunCost, Step
from tests.support.plans import gpt_spec, make_plan

pytestmark = pytest.mark.unit
PRICE = Price(dollars_per_hour=2.0, as_of="2026-01-31", source="a test")
ENTRY = 'dollars_per_hour = 2.5\nas_of = "2026-01-31"\nsource = "me"\n'


def cost(**changes) -> RunCost:
    given = {"rented": Rented(name="h100", machine="h100", price=PRICE, watts=700.0), "basis": "measured", "trains": "all", "states": "exact",
             "epoch": Epoch(form=PACKED, rows=1000, row_tokens=512, tokens=400_000), "epochs": 2, "batch": 32, "largest_batch": 64,
             "step": Step(seconds=3.6, bound_by="compute", overhead_s=0.0, gpu_bytes=1, dram_bytes=1, ssd_bytes=0), **changes}
    return RunCost(**given)


# --- lengths ----------------------------------------------------------------------------------------------------------


def random_lengths(seed: int) -> Lengths:
    r = random.Random(seed)
    return Lengths.of((r.randint(1, 600), r.randint(1, 40)) for _ in range(r.randint(1, 60)))


@pytest.mark.parametrize("seed", range(5))
def test_the_expected_longest_is_what_drawing_gives(seed: int) -> None:
    lengths, r = random_lengths(seed), random.Random(seed)
    rows = [tokens for tokens, number in lengths.counts for _ in range(number)]
    assert lengths.expected_longest(1) == pytest.approx(lengths.mean)
    for batch in (2, 7):
        drawn = [max(r.choices(rows, k=batch)) for _ in range(20_000)]
        assert lengths.expected_longest(batch) == pytest.approx(sum(drawn) / len(drawn), rel=0.02)


@pytest.mark.parametrize("seed", range(20))
def test_a_larger_batch_is_never_narrower_nor_wider_than_the_longest_row(seed: int) -> None:
    lengths = random_lengths(seed)
    widths = [lengths.expected_longest(batch) for batch in (1, 2, 3, 8, 64, 4096)]
    assert widths == sorted(widths) and widths[-1] <= lengths.longest * (1 + 1e-12)


def test_splitting_loses_nothing_and_cutting_does() -> None:
    lengths = Lengths.of([(5, 2), (20, 1), (16, 1)])
    assert lengths.split(8) == Lengths.of([(8, 4), (5, 2), (4, 1)]) and lengths.split(8).tokens == lengths.tokens
    assert lengths.cut(8) == Lengths.of([(5, 2), (8, 2)])


def test_no_row_is_refused() -> None:
    with pytest.raises(RatelError, match="data: there is not one row"):
        Lengths.of([(0, 5)])


# --- constants --------------------------------------------------------------------------------------------------------


def test_constants_that_made_the_points_are_found_again() -> None:
    terms = tuple((1.0, batch * 1e12, batch * share * 1e12) for batch in (1, 2, 5, 9) for share in (0.25, 1.0))
    made = (2.7, 3e-14, 9e-13)
    points = Points(terms=terms, seconds=tuple(sum(map(lambda a, b: a * b, row, made)) for row in terms), work=tuple(t[1] / 1e12 for t in terms))
    assert fit(points) == pytest.approx(made, rel=1e-6)
    assert max(map(abs, left_out_errors(points).values())) < 1e-9


def test_points_that_do_not_differ_say_nothing() -> None:
    with pytest.raises(UndeterminedError, match="--fit: the measured points differ too little"):
        fit(Points(terms=((1.0, 2.0), (1.0, 2.0)), seconds=(1.0, 1.1), work=(1.0, 1.0)))


def test_the_only_point_of_its_kind_is_not_left_out() -> None:
    points = Points(terms=((1.0, 1.0), (1.0, 1.0), (1.0, 4.0)), seconds=(2.0, 2.2, 5.0), work=(1.0, 1.0, 1.0))
    assert list(left_out_errors(points)) == [0, 1]


# --- calibration ------------------------------------------------------------------------------------------------------


def test_a_step_s_flops_do_not_depend_on_the_gpu() -> None:
    plan = make_plan(gpt_spec(12, 1024), "gpu")
    found = [step_work(plan, load_hardware(name)).flops for name in ("4090", "h100", "a40")]
    tokens, blocks = 8 * 1024, 12 * 12 * 1024 ** 2
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)
    # Forward, again, and twice backward: 8 a weight and token, attention and the head beside them.
    assert 8 * blocks * tokens < found[0] < 12 * blocks * tokens + 6.1 * 32000 * 1024 * tokens


def test_a_machine_s_rate_and_a_step_s_overhead_come_out_of_measured_steps() -> None:
    """Seconds that another machine takes, and half a second with each step."""
    other = replace(load_hardware("h100"), gpu_half_tokens=0, gpu_flops=300e12)
    plans = [make_plan(gpt_spec(12, 1024), "gpu", rows=rows, micro_rows=rows, seq_len=seq_len) for rows, seq_len in ((2, 512), (8, 512), (8, 1024), (16, 1024))]
    known = load_hardware("h100")
    found = calibrate([step_work(plan, known) for plan in plans], [predict(plan, other).busy_s["compute"] + 0.5 for plan in plans])
    assert found.gpu_flops == pytest.approx(300e12, rel=1e-6) and found.overhead_s == pytest.approx(0.5, rel=1e-6)
    assert found.error < 1e-6 and found.num_points == 4
    calibrated = found.of(known)
    assert predict(plans[0], calibrated).busy_s["compute"] + found.overhead_s == pytest.approx(predict(plans[0], other).busy_s["compute"] + 0.5)
    assert calibrated.source.startswith("fitted: to 4 measured steps; the rest data sheet")


def test_an_overhead_below_nothing_is_none() -> None:
    found = calibrate([StepWork(flops=1e12, other_s=0.0), StepWork(flops=2e12, other_s=0.0)], [0.9, 2.0])
    assert found.overhead_s == 0.0 and 0.9e12 < found.gpu_flops < 1.2e12 and found.error is not None


def test_steps_that_do_not_take_longer_are_refused() -> None:
    with pytest.raises(RatelError, match="--fit: larger steps do not take longer"):
        calibrate([StepWork(flops=1e12, other_s=0.0), StepWork(flops=2e12, other_s=0.0)], [2.0, 1.0])


@pytest.mark.parametrize("content", ["[", "{}", "[]", '[{"batch": 1, "length": 8, "seconds": 1}]', '[{"batch": 0, "length": 8, "seconds": 1}, {}]',
                                     '[{"batch": 1, "length": 8, "seconds": 0}, {"batch": 1, "length": 8, "seconds": 1}]'])
def test_a_file_of_points_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    path.write_text(content)
    with pytest.raises(RatelError, match="--fit: .*points.json.*Write"):
        read_measured(path)
    with pytest.raises(RatelError, match="--fit: cannot be read"):
        read_measured(tmp_path / "absent.json")


# --- prices -----------------------------------------------------------------------------------------------------------


def test_every_price_that_comes_along_is_dated_and_of_a_known_machine() -> None:
    table = read_table(TABLE)
    assert set(table) == {"a40", "a100-80", "h100"} <= set(machine_names())
    published = json.loads((Path(__file__).parents[2] / "benchmarks/prediction/xia_points.json").read_text())["costs"]
    assert [entry.price.dollars_per_hour for entry in table.values()] == [row["dollars_per_hour"] for row in published]
    assert all(entry.price.as_of and entry.price.source and entry.watts is None for entry in table.values())


def test_a_table_of_one_s_own_takes_the_place_of_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'[big]\n{ENTRY}machine = "h200"\ndram = "256GiB"\nssds = 1\nwatts = 700\n')
    (found,) = rented((), path)
    assert found == Rented(name="big", machine="h200", price=Price(dollars_per_hour=2.5, as_of="2026-01-31", source="me"), dram=256 << 30,
                           ssds=1, watts=700)
    with pytest.raises(RatelError, match="--gpu: is neither .*a99.*Give one of big, 3090"):
        rented(("a99",), path)


def test_a_machine_without_a_price_is_one(tmp_path: Path) -> None:
    own = tmp_path / "mine.json"
    own.write_text("{}")
    found = rented(("h200", "h100", "this", str(own)))
    assert [(each.name, each.machine, each.price is None) for each in found] == [
        ("h200", "h200", True), ("h100", "h100", False), ("this", "this", True), ("mine", str(own), True)]


@pytest.mark.parametrize("text, problem", [
    ("", "names no GPU"), ("[x]\n", "dollars_per_hour"), ("x = 1\n", "x"), ("[x\n", "is not TOML"),
    (f"[x]\n{ENTRY}cores = 3\n", "cores"), ("[x]\n" + ENTRY.replace("2.5", "-1"), "dollars_per_hour"),
    ("[x]\n" + ENTRY.replace("2026-01-31", "lately"), "a date"), (f'[x]\n{ENTRY}dram = "much"\n', "x.dram"), (f"[x]\n{ENTRY}watts = 0\n", "watts")])
def test_a_table_that_is_none_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(RatelError, match="--price") as refused:
        read_table(path)
    assert problem in str(refused.value)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_is_its_steps_at_a_price() -> None:
    found = cost()
    assert found.steps == 63 and found.hours == pytest.approx(0.063) and found.dollars == pytest.approx(0.126)
    assert found.kwh == pytest.approx(0.0441) and found.epoch.padding == pytest.approx(1 - 400 / 512)
    assert found.to_json()["dollars"] == found.dollars and json.dumps(found.to_json())


def test_what_does_not_fit_or_has_no_price_costs_nothing_known() -> None:
    assert cost(step=None, problem="short").dollars is None and cost(step=None).hours is None
    free = cost(rented=Rented(name="h200", machine="h200", price=None))
    assert free.dollars is None and free.kwh is None and free.hours == cost().hours


@pytest.mark.parametrize("seed", range(20))
def test_more_of_anything_never_costs_less(seed: int) -> None:
    r = random.Random(seed)
    base = cost(batch=r.randint(1, 64), epochs=r.randint(1, 5))
    epoch = replace(base.epoch, rows=base.epoch.rows + r.randint(0, 500))
    more = [replace(base, epochs=base.epochs + 1), replace(base, epoch=epoch),
            replace(base, step=replace(base.step, seconds=base.step.seconds * r.uniform(1, 2))),
            replace(base, rented=replace(base.rented, price=replace(PRICE, dollars_per_hour=r.uniform(2, 5))))]
    assert all(other.dollars >= base.dollars for other in more)


def test_the_text_names_the_cheapest_the_fastest_and_every_price() -> None:
    slow = Rented(name="a40", machine="a40", price=replace(PRICE, dollars_per_hour=0.1))
    costs = [cost(), cost(rented=slow, step=replace(cost().step, seconds=7.2)), cost(rented=slow, states="bf16", step=None, problem="DRAM is short"),
             cost(rented=Rented(name="h200", machine="h200", price=None), epoch=Epoch(form=PADDED, rows=1000, row_tokens=300, tokens=250_000))]
    text = describe_costs(costs, ["something"])
    for words in ("cheapest: a40 with packed rows and exact states, $0.0126", "fastest: h100 with packed rows and exact states",
                  "price: h100 $2.00/h as of 2026-01-31, a test", "price: none is known of h200", "a40 with packed rows and bf16 states: DRAM is short",
                  "energy: h100 at most 0.0 kWh", "does not fit", "note: something", "note: padded rows are as wide as"):
        assert words in text, words
    assert text.startswith("trains all, batch 32:\n")


@pytest.mark.parametrize("faster", ["gpu_flops", "gpu_bps", "h2d_bps", "adam_params_per_s", "dram_bps"])
def test_more_of_a_machine_never_costs_more_hours(faster: str) -> None:
    plan, hardware = make_plan(gpt_spec(10, 512), "dram"), load_hardware("a40")
    seconds = [predict(plan, replace(hardware, **{faster: times * getattr(hardware, faster)})).step_s for times in (1, 2, 8)]
    hours = [cost(step=replace(cost().step, seconds=each)).hours for each in seconds]
    assert hours == sorted(hours, reverse=True)
