"""Figures that the Ratel paper (ICDE 2025) reports for its system, as data. Sequence 1024, one GPU.

Testbed: RTX 4090 or 3090 with 24 GB, two Xeon Gold 5320, 768 GB of DDR4-3200, up to 12 Intel P5510.
TFLOP/s in the paper count 8 x parameters x tokens.
"""

SEQ_LEN, VOCAB = 1024, 50257

SHAPES = {"6B": (28, 4096), "13B": (40, 5120), "30B": (48, 7168), "70B": (80, 8192), "135B": (88, 11264),
          "175B": (96, 12288), "276B": (112, 14336), "412B": (128, 16384)}
"""The number of blocks and the hidden size of each model."""

CAPACITY_SHAPES = ("6B", "13B", "30B", "70B", "135B", "276B", "412B")
"""The steps in which it looks for the largest model: 175B is none of its answers."""

STATED_FLOPS_4090 = 160e12
"""What it says the GPU attains at best."""

TOKENS_4090 = {("13B", 8): 412, ("13B", 16): 811, ("13B", 32): 1376, ("13B", 64): 1500, ("13B", 128): 1479}
TOKENS_3090 = {("13B", 8): 397, ("13B", 16): 640, ("13B", 32): 708, ("13B", 64): 678}
BEST_TFLOPS_4090 = {"13B": 155.7, "30B": 148.9, "70B": 148.2, "135B": 101.6, "175B": 86.8}

BEST_BATCH = {"13B": 64, "135B": 24, "175B": 16}
"""Where another figure tells: the batch of its best tokens/s; for 135B see
benchmarks/prediction/paper.py."""

GRADIENT_OFFLOADING = {
    "after backward": {("13B", 8): 340, ("13B", 16): 606, ("13B", 32): 869, ("13B", 64): 1127,
                       ("175B", 8): 26.3, ("175B", 16): 42.6},
    "naive": {("13B", 8): 373, ("13B", 16): 646, ("13B", 32): 990, ("13B", 64): 1228,
              ("175B", 8): 32.3, ("175B", 16): 52.6},
    "optimised": {("13B", 8): 411, ("13B", 16): 811, ("13B", 32): 1376, ("13B", 64): 1498,
                  ("175B", 8): 37.6, ("175B", 16): 62.1},
}
"""Tokens/s by when the CPU optimizer runs."""

TFLOPS_BY_SSDS = {32: {1: 37.5, 2: 64.3, 3: 81.1, 6: 121.7, 12: 142.0},
                  48: {1: 53.1, 2: 89.7, 3: 121.7, 6: 146.3, 12: 153.9},
                  64: {1: 70.3, 2: 111.7, 3: 136.3, 6: 151.5, 12: 148.2}}
"""13B, by batch and number of SSDs."""

TOKENS_135B_BY_SSDS = {1: 26, 2: 49, 3: 65, 6: 89, 12: 94}

STEP_S_AT_BEST_SWAP = {24: 28.1, 36: 27.7, 48: 32.1, 60: 39.7}
"""13B, by batch: the least step time over the bytes swapped."""

STAGES_13B_32 = {"forward": 5.0, "backward and optimizer": 20.0}

LARGEST_BY_DRAM = {128: "70B", 256: "276B", 384: "276B", 512: "276B", 640: "276B", 768: "276B"}
"""The largest model at batch 1, by GB of DRAM."""

LARGEST_BY_TIER = {
    ("dram", 128): {12: "70B", 24: "30B", 36: "13B", 60: "6B"},
    ("ssd", 128): {12: "135B", 24: "135B", 36: "70B", 60: "13B"},
    ("dram", 256): {12: "135B", 24: "30B", 36: "30B", 60: "13B"},
    ("ssd", 256): {12: "276B", 24: "135B", 36: "135B", 60: "13B"},
}
"""The largest models by where activations may go and GB of DRAM, then by batch. The paper's axis
calls the 70B shape 65B here."""
