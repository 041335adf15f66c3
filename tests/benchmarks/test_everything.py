"""The command that measures everything: each of its commands is one that the scripts take, and time
limits are kept."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from benchmarks import everything
from benchmarks.harness.report import commit
from benchmarks.tables import evaluation
from ratel import cli
from tests.support.patience import patience

pytestmark = pytest.mark.unit
ASKED = ["--machine", "box", "--ssd", "/mnt/a", "--ram-disk", "/dev/shm/a"]
ALL = list(everything.measurements(everything.parse(ASKED)))


@pytest.mark.parametrize("measurement", ALL, ids=[m.kind for m in ALL])
def test_its_commands_are_understood(measurement: everything.Measurement, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluation.kind_of(Path(f"box_{measurement.kind}.json")) in evaluation.SECTIONS
    flag, module, *words = measurement.arguments
    assert flag == "-m"
    if measurement.prints_json:
        assert cli.build_parser().parse_args(words).json
        return
    monkeypatch.setattr(sys, "argv", [module, *words, "--json", "x.json"])
    args = importlib.import_module(module).parse()
    assert args.json == "x.json"
    if hasattr(args, "budget_s"):
        assert measurement.about_s <= args.budget_s <= 1.5 * measurement.about_s


def test_what_does_not_fit_into_the_budget_is_not_begun(tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    good = "import sys, json; json.dump({'points': []}, open(sys.argv[2], 'w'))"
    made = [everything.Measurement(kind="long", arguments=("-c", "raise SystemExit(9)"), about_s=patience(1000)),
            everything.Measurement(kind="fails", arguments=("-c", "raise SystemExit(3)"), about_s=patience(5)),
            everything.Measurement(kind="hangs", arguments=("-c", "import time; time.sleep(600)"), about_s=patience(0.5)),
            everything.Measurement(kind="works", arguments=("-c", good), about_s=patience(5)),
            everything.Measurement(kind="prints", arguments=("-c", "print('[{\"layers\": 1}]')"), about_s=patience(5), prints_json=True),
            everything.Measurement(kind="stops", arguments=("-c", "print('['); raise SystemExit(4)"), about_s=patience(5), prints_json=True)]
    (tmp_path / "box_stops.json").write_text("[7]")
    monkeypatch.setattr(everything, "measurements", lambda args: iter(made))
    everything.main([*ASKED, "--results", str(tmp_path), "--budget-s", str(patience(60))])
    said = capfd.readouterr().out
    for words in ("not begun", "fails: exit status 3", f"hangs: ended after {1.5 * patience(0.5):.0f} s", "works: done", "prints: done"):
        assert words in said, said
    assert json.loads((tmp_path / "box_works.json").read_text()) == {"points": []}
    assert json.loads((tmp_path / "box_prints.json").read_text()) == [{"layers": 1, "commit": commit()}]
    assert not (tmp_path / "box_long.json").exists()
    assert json.loads((tmp_path / "box_stops.json").read_text()) == [7] and not list(tmp_path.glob("*.part"))


def test_a_kind_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        everything.parse([*ASKED, "--only", "speed"])
    assert "speed is none of reality, pays, compare" in capsys.readouterr().err
