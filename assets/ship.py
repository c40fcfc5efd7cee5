"""A trained agent.pt as a small file: half precision, averaged weights only, no optimizers.

    python assets/ship.py runs/cpu/agent.pt assets/carracing.pt
"""
import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from assets.checkpoints import load_checkpoint
from assets.files import write_file

NEEDED = ("format", "phase", "seed", "round", "step", "config", "actions", "tokenizer", "ema",
          "heads")


def half(value):
    """Every floating-point tensor of a checkpoint entry as float16."""
    if isinstance(value, dict):
        return {name: half(x) for name, x in value.items()}
    return value.half() if torch.is_tensor(value) and value.is_floating_point() else value


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    state = load_checkpoint(sys.argv[1])
    small = {name: half(state[name]) for name in NEEDED if name in state}
    write_file(sys.argv[2], functools.partial(torch.save, small))
    print(f"{sys.argv[2]}: {Path(sys.argv[2]).stat().st_size / 1e6:.1f} MB")
