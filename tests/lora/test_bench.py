"""The benchmark of adapted linears, small and on the CPU: every order of every part is measured."""

import json

import pytest
import torch

from ratel.errors import RatelError
from ratel.lora.compute import bench
from ratel.lora.compute.bench import LoraBench

pytestmark = pytest.mark.numerics


def test_one_linear_and_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LAYERS", {"tiny": (16, 8, 24)})
    small = LoraBench(rows=8, ranks=(2,), dtype=torch.float32, device=torch.device("cpu"), limit_s=1e-4)
    lines = list(bench.linears(small, ((16, 8),)))
    layers = list(bench.layers(small, ("tiny",)))
    assert [point["dropout"] for point in lines] == [0.0, 0.1] == [point["dropout"] for point in layers]
    assert set(lines[0]["ratios"]) == {"eager", "fused", "f2+b1", "f3+b1", "f4+b1", *(f"f1+b{n}" for n in range(1, 9))}
    assert set(layers[0]["ratios"]) == {"eager", "fused", "apart", "f1+b1"}
    for point in (*lines, *layers):
        assert point["floor"] >= 1 and all(one["device"] > 0 for one in point["ratios"].values())
    text = bench.table(lines)
    assert text.count("\n") == 3 and "16 -> 8" in text and "| tiny |" in bench.table(layers)


def test_the_work_that_is_timed_is_one_work() -> None:
    """Eager without dropout, together and apart: the same outputs from the same inputs."""
    small = LoraBench(rows=8, dtype=torch.float32, device=torch.device("cpu"), limit_s=1e-4)
    work = bench.Work(small, [(16, (8, 12))], rank=3, p=0.0)
    eager, *others = (work._eager(0), work._ours(0, "fused"), work._ours(0, bench.APART), work._ours(0, "f2+b5"))
    for other in others:
        assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(eager, other, strict=True))


def test_the_command_measures_and_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ratel.cli import build_parser

    monkeypatch.setattr(bench, "LAYERS", {"tiny": (16, 8, 24)})

    def run(*words: str) -> None:
        args = build_parser().parse_args(["bench", "lora", "--device", "cpu", "--rows", "4", "--shapes", "8x12", *words])
        args.run(args)

    run("--rank", "2", "--dropout", "0", "--lora-graph", "fused", "--json")
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point.get("layer") for point in points] == [None, "tiny"] and set(points[0]["ratios"]) == {"eager", "fused"}
    for words, expected in ((("--rank", "0"), "--rank"), (("--dropout", "1"), "--dropout"), (("--lora-graph", "f9"), "lora_graph"),
                            (("--shapes", "8"), "--shapes.*4096x1024")):
        with pytest.raises(RatelError, match=expected):
            run(*words)
