"""A model of one's own: any nn.Module with repeated blocks and a loss. Here it learns to continue
noisy waves.

    python examples/own_model.py
"""

import argparse
from collections.abc import Sequence

import torch
from torch import nn

import ratel


class Block(nn.Module):
    """Pre-norm attention over the past, then a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        q, k, v = (t.view(batch, time, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp(self.norm_2(x))


class WaveModel(nn.Module):
    def __init__(self, channels: int = 3, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(Block(width, heads=4) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    predicted = model(batch["waves"][:, :-1])
    return nn.functional.mse_loss(predicted.float(), batch["waves"][:, 1:])


def make_batches(count: int, rows: int = 8, time: int = 64, channels: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    frequency, phase = torch.rand(2, count, rows, 1, channels, generator=generator)
    waves = torch.sin(torch.arange(time).view(1, 1, time, 1) * (0.1 + frequency) + 6.28 * phase)
    waves += 0.05 * torch.randn(waves.shape, generator=generator)
    return [{"waves": batch} for batch in waves]


def main(arguments: Sequence[str] | None = None) -> ratel.TrainResult:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", help="where results go (default: a new directory under runs/)")
    args = parser.parse_args(arguments)
    *batches, held_out = make_batches(33)
    return ratel.train(WaveModel(), batches, loss_fn=loss_fn, eval_data=[held_out], steps=args.steps, batch_size=8,
                       lr=1e-3, dtype="fp32", out=args.out)


if __name__ == "__main__":
    main()
