"""The one table of options: every spelling of a value, every refusal."""

import json
from dataclasses import fields

import pytest

from ratel.config import TrainConfig, flag_of, option_of, resolve
from ratel.errors import RatelError
from ratel.units import GIB

pytestmark = pytest.mark.unit


def test_defaults_are_valid_and_survive_json() -> None:
    config = TrainConfig()
    again = resolve(json.loads(json.dumps(config.to_json())))
    assert again == config


def test_resolved_values_survive_json() -> None:
    config = resolve({"ssd": "/a,/b", "dram": "1.5GiB", "lr": "3e-4", "betas": "0.8,0.95", "micro_batch": "2",
                      "batch_size": "8", "ssd_bandwidth": "3.2GB/s", "export": False, "tier": "ssd"})
    assert config.ssd == ("/a", "/b") and config.dram == 3 * GIB // 2 and config.ssd_bandwidth == 3.2e9
    assert (config.lr, config.betas, config.micro_batch, config.batch_size) == (3e-4, (0.8, 0.95), 2, 8)
    assert resolve(json.loads(json.dumps(config.to_json()))) == config


def test_every_field_has_an_option_with_help() -> None:
    for spec in fields(TrainConfig):
        option = option_of(spec)
        assert option.help and option.group
        assert option.is_switch or option.metavar, f"{spec.name} takes a value but shows none"


@pytest.mark.parametrize(("values", "message"), [
    ({"lr": -1}, r"--lr: must be above 0 \(given: -1"),
    ({"lr": "fast"}, "--lr: not a number"),
    ({"lr": float("nan")}, "--lr: not a number"),
    ({"steps": 0}, r"--steps: must be at least 1 \(given: 0"),
    ({"steps": 2.5}, "--steps: not a whole number"),
    ({"steps": True}, "--steps: not a whole number"),
    ({"lr": 1e-5, "min_lr": 1e-4}, "--min-lr: is above --lr 1e-05"),
    ({"steps": 5, "warmup_steps": 6}, "--warmup-steps: is more than --steps 5"),
    ({"betas": "0.9"}, "--betas: must be two numbers"),
    ({"betas": (0.9, 1.0)}, "--betas: must be below 1"),
    ({"dram": "lots"}, "--dram: not a size"),
    ({"gpu_memory": "24"}, "--gpu-memory: is 24 bytes.*Write the unit: 24GiB"),
    ({"gpu_memory": 0}, "--gpu-memory: must be above 0"),
    ({"ssd_bandwidth": "0GB/s"}, "--ssd-bandwidth: must be above 0"),
    ({"ssd": "/a,/b,/a"}, "--ssd: names the same directory twice"),
    ({"ssd": "/a,,/b"}, "--ssd: must be a name or a path"),
    ({"tier": "ssd"}, "--tier: needs a directory.*Give --ssd DIR"),
    ({"checkpoint_tier": "ssd"}, "--checkpoint-tier: needs a directory"),
    ({"dtype": "fp16"}, "--dtype: not one of the choices.*Use auto or bf16 or fp32"),
    ({"quiet": "yes"}, "--quiet: must be true or false"),
    ({"eval_fraction": 1.0}, "--eval-fraction: must be below 1"),
    ({"eval_every": 5, "eval_fraction": 0}, "--eval-every: there is nothing to evaluate on"),
    ({"keep": 2}, "--keep: no states are saved \\(given: 2\\). Give --save-every N as well"),
    ({"batchsize": 4}, "batchsize: is not an option. Did you mean batch_size?"),
    ({"frobnicate": 4}, "frobnicate: is not an option. See"),
])
def test_mistakes_are_refused(values: dict, message: str) -> None:
    with pytest.raises(RatelError, match=message):
        resolve(values)


def test_file_is_read_and_overridden(tmp_path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "demo"\nbatch-size = 4\nlr = 1e-4\nssd = ["/a", "/b"]\ndram = "2GiB"\nquiet = true\n')
    config = resolve({"lr": "2e-4"}, file)
    assert (config.batch_size, config.lr, config.ssd, config.dram) == (4, 2e-4, ("/a", "/b"), 2 * GIB)
    assert config.quiet


@pytest.mark.parametrize(("text", "message"), [
    ("batchsize = 4", r"batchsize: is not an option in .*run.toml. Did you mean batch_size\?"),
    ("[memory]\ndram = 1", "\\[memory\\]: is a table in .*run.toml"),
    ("steps = 5\nlr = fast", r"--config: is not TOML: .*line 2"),
    ("lr = -1", "--lr: must be above 0"),
    ("batch-size = 2\nbatch_size = 3", "batch_size: stands twice in .*run.toml, with - and with _"),
])
def test_mistakes_in_the_file_are_named(tmp_path, text: str, message: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(RatelError, match=message):
        resolve({}, file)


def test_missing_file_is_refused(tmp_path) -> None:
    with pytest.raises(RatelError, match="--config: cannot be read: No such file"):
        resolve({}, tmp_path / "none.toml")


@pytest.mark.parametrize(("steps", "expected"), [(5, 0), (40, 4), (1000, 10)])
def test_automatic_warmup_is_short_in_a_short_run(steps: int, expected: int) -> None:
    assert TrainConfig(steps=steps).num_warmup_steps == expected


def test_flags_are_spelled_with_dashes() -> None:
    assert flag_of("max_grad_norm") == "--max-grad-norm"
