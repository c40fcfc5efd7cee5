"""Checkpoints: one file with weights, settings and action space, which are checked when it is read.

    from assets.checkpoints import load_checkpoint
"""
import json
import warnings
import zipfile
from dataclasses import fields
from pathlib import Path

import torch

from assets.files import describe, fail
from assets.worlds import checked_sizes
from dreamer4 import Agent, Config, Dynamics, Tokenizer

# Version of the files
FORMAT = 1
# What looking at contents that do not fit may raise; SyntaxError: NumPy, on the name of a dtype
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError,
           RuntimeError, RecursionError, SyntaxError)
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
        with warnings.catch_warnings():
            # the error says the same
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises many kinds of errors on damaged files
        reason = " ".join(str(error).split())[:200]
        fail(f"checkpoint {path} is damaged or no checkpoint ({reason}); restore it from a copy or "
             "delete it and train that phase again")
    version = state.get("format") if isinstance(state, dict) else None
    if type(version) is not int or version != FORMAT:
        fail(f"checkpoint {path} is of another version (this code reads format {FORMAT}); "
             "train it again")
    # older ones were written only once
    state.setdefault("finished", True)
    try:
        check_contents(state)
    except DAMAGED as error:
        fail(f"checkpoint {path}: its contents do not fit together ({describe(error)}); restore it "
             "from a copy or delete it and train that phase again")
    return state


def check_contents(state):
    """Raises one of the errors in DAMAGED for what is missing or wrong."""
    for name in ("round", "step", "seed"):
        if type(state[name]) is not int or not 0 <= state[name] < 10 ** 9:
            raise ValueError(f"{name} is {state[name]!r}")
    is_unfinished = not state["finished"]
    health = {"good", "advantage_std", "kl", "reward"} if state["phase"] == "imagination" else set()
    known = state.get("metrics", {}).keys()
    if is_unfinished and state["step"] and not (known and health <= known):
        raise ValueError("an unfinished phase has no metrics")
    if {type(x) for x in state.get("metrics", {}).values()} - {float}:
        raise ValueError(f"metrics are {state['metrics']}")
    config = Config(**{field.name: state["config"][field.name] for field in fields(Config)})
    # JSON knows no NaN
    sizes = checked_sizes(json.loads(state["actions"], parse_constant=int))
    if sizes != config.action_spec:
        raise ValueError(f"actions of {sizes} categories, but an action_spec of "
                         f"{config.action_spec}")
    # no memory, no time: only names and shapes
    with torch.device("meta"):
        model, tokenizer = MODELS[state["phase"]](config), Tokenizer(config)
    modules = {"ema": model, "model": model, "tokenizer": tokenizer, "heads": model, "prior": model}
    needed = {"tokenizer", "ema"} if isinstance(model, Agent) else {"ema"}
    if state["phase"] == "imagination":
        needed |= {"heads", "prior"} if is_unfinished else {"heads"}
    for name in modules.keys() & {*state, *needed}:
        check_numbers(state[name])
        found, wanted = shapes(state[name]), shapes(modules[name].state_dict())
        if name in ("heads", "prior"):
            wanted = {key: x for key, x in wanted.items() if key.startswith(("policy", "value"))}
        # no imagination yet, so no prior
        if found != wanted and (name, found) != ("prior", {}):
            raise ValueError(f"the weights of {name} are not those of phase and config")


def check_numbers(weights):
    """Raises ValueError for what is no tensor of a model, or has other than usual numbers."""
    for name, x in weights.items():
        # fused optimizers would write beyond an expanded one
        if x.layout != torch.strided or x.is_nested or x.is_meta or not x.is_contiguous():
            raise ValueError(f"{name} is a tensor of another kind")
        # NaN is not below
        if x.numel() and not x.abs().max() < 1e6:
            raise ValueError(f"{name} has numbers that are not finite or very large")


def shapes(weights):
    """Shape of every weight, and whether it is a floating-point number."""
    return {name: (tuple(x.shape), x.is_floating_point()) for name, x in weights.items()}


def load_optimizers(optimizers, state, path):
    """Momenta of a checkpoint -> the optimizers, whose rates and the like stay those of the code.

    They must be those of the parameters: the fused AdamW writes to where they should be.
    """
    names = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}
    try:
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            ours, momenta = optimizer.state_dict()["param_groups"], saved["state"]
            parameters = optimizer.param_groups[0]["params"]
            if state["step"] and len(momenta) < len(parameters):
                raise ValueError(f"momenta of {len(momenta)} weights, not of {len(parameters)}")
            for i, entries in momenta.items():
                check_numbers(entries)
                for name in entries.keys() & {"step", "exp_avg_sq"}:
                    if (entries[name] < 0).any():
                        raise ValueError(f"{name} is negative")
                wanted = {name: () if name == "step" else tuple(parameters[i].shape)
                          for name in names[type(optimizer).__name__]}
                found = {name: shape for name, (shape, _) in shapes(entries).items()}
                if found != wanted or {x.dtype for x in entries.values()} != {torch.float32}:
                    raise ValueError(f"{found} instead of {wanted}")
            optimizer.load_state_dict({"state": momenta, "param_groups": ours})
    except DAMAGED as error:
        fail(f"{path} cannot be trained on: its optimizers are missing or damaged "
             f"({describe(error)}); use another --run")
