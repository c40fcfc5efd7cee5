"""A trained agent.pt as a small file: half precision, averaged weights only, no optimizers.

    python assets/ship.py runs/cpu/agent.pt assets/carracing.pt
"""
import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from assets.checkpoints import check_numbers, load_checkpoint
from assets.files import fail, in_one_line, new_parser, write_file

NEEDED = ("format", "phase", "seed", "round", "step", "config", "actions", "tokenizer", "ema",
          "heads")


def half(value):
    """Every floating-point tensor of a checkpoint entry as float16."""
    if isinstance(value, dict):
        return {name: half(x) for name, x in value.items()}
    return value.half() if torch.is_tensor(value) and value.is_floating_point() else value


@in_one_line()
def main(arguments=None):
    parser = new_parser(__doc__)
    parser.add_argument("agent", type=Path, help="agent.pt of a run")
    parser.add_argument("small", type=Path, help="file to write")
    args = parser.parse_args(arguments)
    state = load_checkpoint(args.agent)
    if "tokenizer" not in state:
        fail(f"checkpoint {args.agent} holds no agent; give agent.pt")
    if not state["finished"]:
        fail(f"checkpoint {args.agent} is in the middle of its training; finish it first")
    # in the place of an older small one, but of nothing else
    if args.small.exists() and "model" in load_checkpoint(args.small):
        fail(f"{args.small} is a checkpoint to train on; name another file to write")
    small = {name: half(state[name]) for name in NEEDED if name in state}
    try:
        for name in {"tokenizer", "ema", "heads"} & small.keys():
            check_numbers(small[name])
    except ValueError as error:
        fail(f"{args.agent} has weights too large for half precision ({name}: {error})")
    write_file(args.small, functools.partial(torch.save, small))
    print(f"{args.small}: {args.small.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
