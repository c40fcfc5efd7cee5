"""Checkpoints: one file with weights, settings and action space, which are checked when it is read.

    from assets.checkpoints import load_checkpoint
"""
import json
import zipfile
from dataclasses import fields
from pathlib import Path

import torch

from assets.files import describe, fail
from assets.worlds import action_sizes, to_action
from dreamer4 import Agent, Config, Dynamics, Tokenizer

# Version of the files
FORMAT = 1
# What each phase trains
MODELS = {"tokenizer": Tokenizer, "dynamics": Dynamics, "agent": Agent, "imagination": Agent}


def load_checkpoint(path):
    """Reads a checkpoint: a dict of tensors and plain values that fit together."""
    if not Path(path).is_file():
        fail(f"checkpoint {path} does not exist or is no file; train it first, or give another "
             "--checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch does not look at the checksums
            if name := archive.testzip():
                raise ValueError(f"checksum of {name}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises many kinds of errors on damaged files
        reason = " ".join(str(error).split())[:200]
        fail(f"checkpoint {path} is damaged or no checkpoint ({reason}); restore it from a copy or "
             "delete it and train that phase again")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        fail(f"checkpoint {path} is of another version (this code reads format {FORMAT}); "
             "train it again")
    try:
        check_contents(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fail(f"checkpoint {path}: its contents do not fit together ({describe(error)}); restore it "
             "from a copy or delete it and train that phase again")
    # older ones were written only once
    state.setdefault("finished", True)
    return state


def check_contents(state):
    """Raises a KeyError, TypeError, ValueError or AttributeError for what is missing or wrong."""
    for name in ("round", "step", "seed"):
        if type(state[name]) is not int or state[name] < 0:
            raise ValueError(f"{name} is {state[name]!r}")
    config = Config(**{field.name: state["config"][field.name] for field in fields(Config)})
    actions = json.loads(state["actions"])
    if action_sizes(actions) != config.action_spec:
        raise ValueError(f"actions of {action_sizes(actions)} categories, but an action_spec of "
                         f"{config.action_spec}")
    # recorded data knows nothing but the sizes
    if "low" in actions:
        to_action(actions, [0] * len(config.action_spec))
    # no memory, no time: only names and shapes
    with torch.device("meta"):
        model, tokenizer = MODELS[state["phase"]](config), Tokenizer(config)
    modules = {"ema": model, "model": model, "tokenizer": tokenizer, "heads": model, "prior": model}
    needed = {"tokenizer", "ema"} if isinstance(model, Agent) else {"ema"}
    if state["phase"] == "imagination":
        needed.add("heads")
    for name in modules.keys() & {*state, *needed}:
        found, wanted = shapes(state[name]), shapes(modules[name].state_dict())
        # heads and prior: policy and value head only
        fits = found.items() <= wanted.items() if name in ("heads", "prior") else found == wanted
        if not fits:
            raise ValueError(f"the weights of {name} are not those of phase and config")


def shapes(weights):
    """Shape of every weight, and whether it is a floating-point number."""
    return {name: (tuple(x.shape), x.is_floating_point()) for name, x in weights.items()}
