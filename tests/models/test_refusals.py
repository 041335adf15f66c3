"""What cannot be trained is refused, with its reason, before anything is touched."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.models import load
from tests.models.test_modules import Layer, PatchRegression, loss_fn, make_patch_model, make_patches
from tests.support.models import CPU, configs, make_batch, make_model

pytestmark = pytest.mark.unit


def refused(message: str, source: Any, **settings: Any) -> RatelError:
    settings = {"dtype": torch.float32, "device": CPU} | settings
    with pytest.raises(RatelError, match=message) as caught:
        parts = load(source, **settings)
        parts.stored.check_source()
        parts.probe(make_patches())
    assert caught.value.field
    return caught.value


# --- directories ----------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_model("llama").save_pretrained(tmp_path)
    return tmp_path


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_missing_tensors(directory: Path) -> None:
    rewrite(directory, lambda t: [t.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in range(3)])
    error = refused("lack model.layers.0.mlp.up_proj.weight, model.layers.1.*, model.layers.2", directory)
    assert error.remedy and str(directory) in str(error)


def test_an_untied_head_that_is_missing(directory: Path) -> None:
    rewrite(directory, lambda t: t.pop("lm_head.weight"))
    refused("lack lm_head.weight", directory)


def test_a_wrong_shape(directory: Path) -> None:
    rewrite(directory, lambda t: t.update({"model.norm.weight": torch.ones(31)}))
    refused(r"model.norm.weight is \[31\], the model needs \[32\]", directory)


def test_a_missing_expert(tmp_path: Path) -> None:
    make_model("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(n for n in tensors if "experts.2." in n)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    refused("layers.0.mlp.experts", tmp_path)


def test_weights_in_integers(directory: Path) -> None:
    rewrite(directory, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    refused("stored as I8", directory)


@pytest.mark.parametrize("keep", [0, 5, 100, -100])
def test_a_file_that_is_cut_off(directory: Path, keep: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    error = refused("cut off|not a readable safetensors file", directory)
    assert error.value == path


@pytest.mark.parametrize("header", [b"not json", b"[1, 2]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [3],'
                                    b' "data_offsets": [0, 4]}}'])
def test_a_corrupt_header(directory: Path, header: bytes) -> None:
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    refused("not a readable safetensors file", directory)


def test_a_missing_shard_and_a_corrupt_index(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    refused("a file that the index names is missing", tmp_path)
    shard.write_bytes(content)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": [')
    refused("not an index", tmp_path)


def test_no_weights_or_only_pickled_ones(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    refused("no model.safetensors", directory)
    (directory / "pytorch_model.bin").write_bytes(b"")
    assert "save_pretrained" in str(refused("pickled", directory).remedy)


def test_configurations(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())

    def with_config(text: str | None) -> Path:
        (directory / "config.json").unlink() if text is None else (directory / "config.json").write_text(text)
        return directory

    refused("unknown model type 'lama'", with_config(json.dumps(config | {"model_type": "lama"})))
    refused("no model_type", with_config(json.dumps({k: v for k, v in config.items() if k != "model_type"})))
    refused("quantized", with_config(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})))
    refused("not a readable configuration", with_config("{"))
    refused("no config.json", with_config(None))


def test_names_that_are_neither_directory_nor_preset(tmp_path: Path) -> None:
    assert "llama-7b" in str(refused("neither a directory nor a preset", "llama-7").remedy)
    assert "nothing is downloaded" in str(refused("neither", "meta-llama/Llama-3.1-8B").remedy)
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused("is a file", tmp_path / "model.safetensors")
    refused("not a model", 3)


def test_options() -> None:
    refused("unknown attention", "demo", attention="fast")
    refused("on a CUDA device", "demo", attention="flash", dtype=torch.bfloat16)
    error = refused("at most 1024 tokens", "demo", max_seq_len=2000)
    assert error.field == "--seq-len"


def test_an_encoder_decoder() -> None:
    from transformers import T5Config

    refused("encoder-decoder", T5Config())


# --- modules --------------------------------------------------------------------------------------------------------


class Odd(PatchRegression):
    """A model whose forward is given by the test."""

    def __init__(self, run: Callable[["Odd", Tensor], Tensor], layer: Callable[[], nn.Module] = Layer) -> None:
        super().__init__([layer() for _ in range(3)], with_bias=False)
        self.run = run

    def forward(self, patches: Tensor) -> Tensor:
        return self.head(self.norm(self.run(self, self.embed(patches) + self.position)))


def changed_between(model: Odd, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = 0.5 * layer(scale=1.0, hidden=x)[0]
    return x


def changed_in_place(model: Odd, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = layer(scale=1.0, hidden=x)[0]
        x += 1
    return x


def skip_around(model: Odd, x: Tensor) -> Tensor:
    first = x * 2
    x = first
    for layer in model.layers:
        x, _ = layer(scale=1.0, hidden=x)
    return x + first


def intermediate_outputs(model: Odd, x: Tensor) -> Tensor:
    seen = []
    for layer in model.layers:
        x, _ = layer(scale=1.0, hidden=x)
        seen.append(x)
    return seen[0] + seen[-1]


def argument_from_a_block(model: Odd, x: Tensor) -> Tensor:
    bias = None
    for layer in model.layers:
        x, _ = layer(scale=1.0, hidden=x, bias=bias)
        bias = x.mean(0) @ x.mean(0).T
    return x


def last_output_unused(model: Odd, x: Tensor) -> Tensor:
    y = x
    for layer in model.layers:
        y, _ = layer(scale=1.0, hidden=y)
    return model.position.sum() + y.detach()


def without_gradient(model: Odd, x: Tensor) -> Tensor:
    with torch.no_grad():
        return plainly(model, x)


def only_one_block(model: Odd, x: Tensor) -> Tensor:
    return model.layers[0](scale=1.0, hidden=x)[0]


def plainly(model: Odd, x: Tensor) -> Tensor:
    for layer in model.layers:
        x, _ = layer(scale=1.0, hidden=x)
    return x


@pytest.mark.parametrize("run, reason", [
    (changed_between, "changed before the next block"), (changed_in_place, "changed in place"),
    (skip_around, "skip connection"), (intermediate_outputs, "earlier block"),
    (argument_from_a_block, "computed from another block's output"), (last_output_unused, "last block's output"),
    (without_gradient, "no gradient"), (only_one_block, "called 1 of the blocks"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_forwards_that_do_more_than_pass_hidden_states_along(run: Callable[..., Tensor], reason: str) -> None:
    refused(f"cannot be run one block at a time: .*{reason}", Odd(run), loss_fn=loss_fn)


class TwoOutputs(Layer):
    def forward(self, *, scale: float, hidden: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().forward(scale=scale, hidden=hidden, bias=bias)[0], hidden.mean(0)[:, :PATCH_COUNT]


PATCH_COUNT = 6


def two_tensors_along(model: Odd, x: Tensor) -> Tensor:
    bias = None
    for layer in model.layers:
        x, bias = layer(scale=1.0, hidden=x, bias=bias)
    return x


class FindsItsBias(Layer):
    """Takes what the model has left in an attribute of the class."""

    bias: Tensor

    def forward(self, *, scale: float, hidden: Tensor, bias: Tensor | None = None) -> tuple[Tensor, None]:
        return super().forward(scale=scale, hidden=hidden, bias=FindsItsBias.bias)


def left_in_an_attribute(model: Odd, x: Tensor) -> Tensor:
    FindsItsBias.bias = model.position @ model.position.T
    return plainly(model, x)


def test_a_block_that_finds_what_it_is_not_given() -> None:
    try:
        refused("uses something computed before it that is not among its arguments .*Hand it to the block",
                Odd(left_in_an_attribute, FindsItsBias), loss_fn=loss_fn)
    finally:
        del FindsItsBias.bias


def auxiliary_loss(model: Odd, x: Tensor) -> Tensor:
    extra = 0.0
    for layer in model.layers:
        x, more = layer(scale=1.0, hidden=x)
        extra = extra + more.sum()
    return x + extra


def test_blocks_that_return_more_than_hidden_states() -> None:
    refused("more than one tensor", Odd(two_tensors_along, TwoOutputs), loss_fn=loss_fn)
    refused("earlier block|more of a block's output", Odd(auxiliary_loss, TwoOutputs), loss_fn=loss_fn)


class Counting(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *, scale: float, hidden: Tensor, bias: Tensor | None = None) -> tuple[Tensor, None]:
        self.calls += 1
        return super().forward(scale=scale, hidden=hidden, bias=bias)


def test_a_buffer_that_forward_writes_to() -> None:
    error = refused("forward writes to the buffer", Odd(plainly, Counting), loss_fn=loss_fn)
    assert error.value == "layers.0.calls"


def test_batch_normalization() -> None:
    model = make_patch_model()
    model.layers[1].mlp.add_module("bn", nn.BatchNorm1d(6))
    refused("batch normalization", model, loss_fn=loss_fn)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float64])
def test_parameters_an_fp32_master_cannot_hold(dtype: torch.dtype) -> None:
    model = make_patch_model()
    model.layers[0].extra = nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=False)
    refused("fp32 master", model, loss_fn=loss_fn)


def test_no_repeated_blocks() -> None:
    refused("no repeated blocks found", nn.Sequential(nn.Linear(5, 5), nn.Conv1d(5, 5, 1)), loss_fn=loss_fn)
    model = make_patch_model()
    model.huge = nn.Linear(1000, 100)
    refused("no repeated blocks found", model, loss_fn=loss_fn)


def test_a_module_without_a_loss() -> None:
    assert refused("how to compute its loss", make_patch_model()).field == "loss_fn"


def test_nothing_to_train() -> None:
    refused("nothing to train", make_patch_model().requires_grad_(False), loss_fn=loss_fn)


def test_meta_modules_that_cannot_be_given_values() -> None:
    with torch.device("meta"):
        model = make_patch_model()
    model.frequencies = torch.empty(16, device="meta")
    refused("the buffer has no values", model, loss_fn=loss_fn)
    model.frequencies = torch.ones(16)
    refused("no reset_parameters", model, loss_fn=loss_fn)


def test_modules_whose_weights_are_partly_elsewhere() -> None:
    model = make_patch_model()
    model.layers[1].to("meta")
    refused("are elsewhere", model, loss_fn=loss_fn)


def test_a_refused_module_is_left_as_it_was() -> None:
    model = make_patch_model().eval()
    weight = model.head.weight.detach().clone()
    model.layers[2].mlp.add_module("bn", nn.BatchNorm1d(6))
    refused("batch normalization", model, loss_fn=loss_fn)
    del model.layers[2].mlp.bn
    model.register_buffer("lost", torch.empty(3, device="meta"))
    refused("no values", model, loss_fn=loss_fn)
    assert torch.equal(model.head.weight, weight) and not model.training
    assert not any("forward" in vars(m) for m in model.modules())


def test_layer_dropping_is_noticed_when_it_happens() -> None:
    from transformers import AutoModelForCausalLM

    config = configs()["opt"]()
    config.layerdrop = 0.9
    with pytest.raises(RatelError, match="layer dropping|called . of the blocks|changed before"):
        parts = load(AutoModelForCausalLM.from_config(config), dtype=torch.float32, device=CPU)
        for _ in range(20):
            parts.head(make_batch())


@pytest.mark.parametrize(("change", "message"), [({"vocab_size": -1}, "transformers cannot build it"),
                                                 ({"num_key_value_heads": 3}, "of this configuration cannot run.*Check the sizes")])
def test_sizes_that_do_not_go_together(change: dict[str, int], message: str, directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    error = refused(message, directory)
    assert error.field == "model"


def test_weights_that_config_json_has_no_place_for_are_named(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(directory, dtype=torch.float32, device=CPU).close()
    assert caplog.text == ""
    path = directory / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "num_hidden_layers": content["num_hidden_layers"] - 1}))
    load(directory, dtype=torch.float32, device=CPU).close()
    assert "of the weights model.layers." in caplog.text and "more are not used" in caplog.text


def test_a_model_without_a_limit_says_so_with_minus_one() -> None:
    """XLNet."""
    from types import SimpleNamespace

    from ratel.models.structure.unit_layout import longest_sequence

    for said, limit in ((-1, None), (None, None), (64, 64)):
        module = nn.Linear(2, 2)
        module.config = SimpleNamespace(max_position_embeddings=said)
        assert longest_sequence(module) == limit
