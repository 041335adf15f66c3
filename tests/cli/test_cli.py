"""The command line as a process and as a function: speed, exit statuses, one-line mistakes, and the
documents."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from ratel import cli
from ratel.config import TrainConfig, flag_of, option_of, resolve
from ratel.errors import RatelError, WorkerError
from tests.support.patience import patience

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
OPTIONS_BEGIN, OPTIONS_END = "<!-- options: written by tests/cli/test_cli.py, which compares -->", "<!-- end of options -->"


def ratel(*arguments: str, timeout_s: float = patience(60)) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ratel", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=timeout_s)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_imports_little(arguments: list[str]) -> None:
    """It imports nothing but a few modules of its own: a fraction of what PyTorch alone would."""
    check = ("import sys, atexit; atexit.register(lambda: print('modules', len(sys.modules), file=sys.stderr)); "
             "sys.argv = ['ratel', *sys.argv[1:]]; from ratel.__main__ import main; main()")
    done = subprocess.run([sys.executable, "-c", check, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=patience(60))
    assert "usage: ratel" in done.stdout
    assert int(done.stderr.split("modules ")[1].split()[0]) < 400


@pytest.mark.parametrize("source", [
    "import ratel; dir(ratel); ratel.RatelError",
    "from ratel.cli import main; main(['train', '--lr', '-1'])",
    "from ratel.cli import build_parser; build_parser().format_help()",
])
def test_nothing_heavy_is_imported_before_it_is_needed(source: str) -> None:
    check = "import sys; print([m for m in ('torch', 'transformers', 'numpy', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"{source}\n{check}"], cwd=ROOT, capture_output=True, text=True,
                          timeout=patience(60))
    assert done.stdout.strip() == "[]", done


def test_train_and_plan_are_functions() -> None:
    import ratel as package

    import ratel.planner.shape
    import ratel.training.schedule

    assert callable(package.train) and callable(package.plan)
    assert package.training.schedule.make_schedule and package.planner.shape.lay_out
    with pytest.raises(AttributeError, match="no attribute 'trane'"):
        package.trane


def test_version() -> None:
    import ratel as package

    assert ratel("--version").stdout.strip() == package.__version__


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", "--bach-size", "3"], "ratel: --bach-size: is not an option here. Did you mean --batch-size?"),
    (["train", "--batch", "3"], "ratel: --batch: is not an option here"),
    (["train", "--lr"], "ratel: --lr: needs a value. Write --lr X"),
    (["train", "--lr", "-1"], "ratel: --lr: must be above 0 (given: -1"),
    (["train"], "ratel: --model: is missing"),
    (["train", "--model", "demo", "--ssd-bandwidth", "3"], "ratel: --ssd-bandwidth: is 3 bytes a second (given: 3). Write the unit: 3GB/s"),
    (["plan", "--model", "demo", "--hardware", "4090", "--endurance", "3500"],
     "ratel: --endurance: has no unit (given: 3500). Write the unit: 3500TBW"),
    (["train", "--model", "demo", "--config", "none.toml"], "ratel: --config: cannot be read"),
    (["trian"], "ratel: is not a command (given: trian). Did you mean train?"),
    (["doctor", "--sdd", "x"], "ratel: --sdd: is not an option here. Did you mean --ssd?"),
    (["doctor", "--ssd", "/nothing/here"], "ratel: --ssd: is not a directory (given: /nothing/here). Make it"),
    (["doctor", "--probe", "--ssd", "/nothing/here"], "ratel: --ssd: is not a directory (given: /nothing/here). Make it"),
    (["bench", "step", "--steps", "0"], "ratel: argument --steps: must be at least 1 (given: 0)"),
    (["bench", "adam", "--threads", "no"], "ratel: argument --threads: not a whole number (given: 'no')"),
    (["bench"], "ratel: the following arguments are required: PART"),
    (["bench", "io"], "ratel: the following arguments are required: --ssd"),
    (["bench", "io", "--ssd", "/nothing/here"], "ratel: --ssd: is not a directory (given: /nothing/here). Make it"),
    (["bench", "io", "--ssd", "/proc"], "ratel: bench io: "),
    (["bench", "io", "--ssd", "/tmp", "--size", "5MiB"], "ratel: --size: is not a multiple of 64.00 MiB (given: 5MiB)"),
    (["bench", "adam", "--threads", "-3"], "ratel: argument --threads: must be at least 1 (given: -3)"),
    (["bench", "adam", "--param", "3"], "ratel: --param: is not an option here. Did you mean --params?"),
    (["doctor", "--ssd", "/proc"], "ratel: --ssd: cannot be written to"),
])
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], message: str,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(message) and err.count("\n") == 1 and out == ""


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "train" in capsys.readouterr().out


@pytest.fixture
def run_instead(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[TrainConfig]]:
    """Puts a function in the place of the run; returns the configurations that reach it."""

    def replace(action: Callable[[], None]) -> list[TrainConfig]:
        import ratel.training.run as module

        seen: list[TrainConfig] = []

        def run(config: TrainConfig, **objects: Any) -> None:
            seen.append(config)
            action()

        monkeypatch.setattr(module, "run", run)
        return seen

    return replace


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def test_flags_override_the_file(run_instead: Any, tmp_path: Path) -> None:
    seen = run_instead(lambda: None)
    file = tmp_path / "run.toml"
    file.write_text('model = "demo"\nsteps = 7\nbatch-size = 4\nexport = false')
    assert cli.main(["train", "--config", str(file), "--steps", "9", "--quiet", "--ssd", "/a,/b"]) == 0
    assert seen == [resolve({"model": "demo", "steps": 9, "batch_size": 4, "export": False, "quiet": True,
                             "ssd": ("/a", "/b")})]


@pytest.mark.parametrize(("error", "status", "message"), [
    (RatelError("is too small", field="--dram", value="1MiB", remedy="Give 2MiB"), 2,
     "ratel: --dram: is too small (given: 1MiB). Give 2MiB\n"),
    (RatelError("first\n   second"), 2, "ratel: first second\n"),
    (KeyboardInterrupt(), 130, "ratel: interrupted\n"),
    (KeyboardInterrupt("stopped after step 3 of 9"), 130, "ratel: stopped after step 3 of 9\n"),
])
def test_exit_status(run_instead: Any, capsys: pytest.CaptureFixture[str], error: BaseException, status: int,
                     message: str) -> None:
    run_instead(raising(error))
    assert cli.main(["train", "--model", "demo"]) == status
    assert capsys.readouterr().err == message


def test_a_failed_worker_is_reported_with_its_cause(run_instead: Any, capsys: pytest.CaptureFixture[str]) -> None:
    error = WorkerError("the copy thread failed")
    error.__cause__ = OSError("disk on fire")
    run_instead(raising(error))
    assert cli.main(["train", "--model", "demo"]) == 1
    assert capsys.readouterr().err == "ratel: the copy thread failed (OSError: disk on fire)\n"


def test_an_error_of_the_program_keeps_its_traceback(run_instead: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_instead(raising(ZeroDivisionError("oh")))
    assert cli.main(["train", "--model", "demo"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(f"{shlex.quote(sys.executable)} -m ratel doctor --no-measure | true; exit ${{PIPESTATUS[0]}}",
                          shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True, timeout=patience(60),
                          env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"})
    assert done.returncode == 0 and "Traceback" not in done.stderr


@pytest.mark.native
def test_doctor_reports_as_json(ssd_dir: Path) -> None:
    done = ratel("doctor", "--json", "--ssd", str(ssd_dir))
    report = json.loads(done.stdout)
    assert report["host"]["cpu"]["cores"] >= 1 and report["host"]["memory"]["available_bytes"] > 0
    assert report["adamw"]["params_per_s"] > 0 and report["native"]["adamw_isa"] in ("scalar", "avx2", "avx512")
    (entry,) = report["ssd"]
    assert entry["free_bytes"] > 0 and entry["rates"]["read_bps"] > 0 and entry["rates"]["write_bps"] > 0
    assert list(ssd_dir.iterdir()) == [], "the doctor leaves files behind"


@pytest.mark.native
def test_doctor_reports_as_text(ssd_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--no-measure", "--ssd", str(ssd_dir)]) == 0
    text = capsys.readouterr().out
    assert all(label in text for label in ("processor", "memory", "native code", "GPU", str(ssd_dir)))


@pytest.mark.native
def test_bench_io_reports_as_json(ssd_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "io", "--ssd", str(ssd_dir), "--size", "64MiB", "--repeats", "1", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert {row["pattern"] for row in results} >= {"read", "write"} and all(row["percent"] > 0 for row in results)
    assert list(ssd_dir.iterdir()) == []


@pytest.mark.native
def test_bench_adam_shows_percent_of_bandwidth(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "adam", "--params", "65536", "--threads", "1", "--repeats", "1", "--no-torch"]) == 0
    assert "% of bandwidth" in capsys.readouterr().out


def options_table() -> str:
    """The option tables of docs/cli.md."""
    lines: list[str] = []
    group = None
    for spec in fields(TrainConfig):
        option = option_of(spec)
        if option.group != group:
            group = option.group
            lines += ["", f"### {group[0].upper()}{group[1:]}", "", "| option | default | meaning |", "|---|---|---|"]
        default = "" if spec.default in (None, (), MISSING) else str(spec.default).lower() if option.is_switch else spec.default
        default = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        flag = f"{flag_of(spec.name)} {option.metavar}" if option.metavar else flag_of(spec.name)
        lines.append(f"| `{flag.replace('|', chr(92) + '|')}` | {default} | {option.help} |")
    return "\n".join([*lines, ""])


def test_the_documented_options_are_the_options() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    documented = text.partition(OPTIONS_BEGIN + "\n")[2].partition(OPTIONS_END)[0]
    assert documented == options_table(), f"put this into docs/cli.md:\n{options_table()}"


def documented_commands() -> list[str]:
    commands = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```console\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL):
            commands += [line[2:].partition("  #")[0].strip() for line in block.splitlines() if line.startswith("$ ")]
    return commands


def ratel_arguments(command: str) -> list[str] | None:
    """What ``ratel`` is called with, directly or through run.sh; None for other programs."""
    words = shlex.split(command)
    if words[:2] == ["bash", "run.sh"]:
        rest = words[2:]
        return None if not rest or rest[0] == "test" else ["train", *rest] if rest[0].startswith("-") else rest
    return words[1:] if Path(words[0]).name == "ratel" else None


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their flags parse and their values are valid. CI runs the two that need nothing: see
    .ci/run."""
    arguments = ratel_arguments(command)
    if arguments is None:
        known = (ROOT / ".ci" / "run").read_text().splitlines()
        assert command in known or is_project_program(command), f"nothing runs {command!r}"
        return
    monkeypatch.chdir(ROOT)
    args = cli.build_parser().parse_all(arguments)
    if getattr(args, "resume", False):
        return  # its other options are in the run's directory: tests/training/test_resume.py
    if args.command == "train":
        assert cli.train.train_config(args).model is not None
    else:
        assert callable(args.run)


def is_project_program(command: str) -> bool:
    words = shlex.split(command.removeprefix("sudo "))
    if words[0].endswith(".sh"):
        return (ROOT / words[0]).is_file()  # run with stand-ins: tests/cli/test_make_raid.py
    is_module = words[1:2] == ["-m"] and (ROOT / (words[2].replace(".", "/") + ".py")).is_file()
    return words[0].endswith("python") and (is_module or (ROOT / words[1]).is_file())


def test_ci_runs_the_two_commands() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "bash run.sh" in lines and "bash run.sh test" in lines
    assert {"bash run.sh", "bash run.sh test"} <= set(documented_commands())
