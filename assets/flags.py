"""The command line of train.py: its own flags, and one for every field of the configs.

    python train.py --help
"""
import argparse
import inspect
import json
import os
import re
from dataclasses import fields
from pathlib import Path

import torch

from assets import worlds
from assets.checkpoints import DAMAGED, load_checkpoint
from assets.files import describe, fail, print0
from assets.run import PHASES, READ_ONLY, Run
from dreamer4 import Config

# Every seed has its own seeds of the environment (train.SEEDS_PER_RUN)
MAX_SEED = 9998


def flag_type(field):
    """How the text of a flag becomes a field's value; argparse shows these functions' names."""
    def numbers(text):
        return tuple(int(part) for part in re.split("[x,]", text))

    def boolean(text):
        return bool(("false", "true").index(text.lower()))

    if str(field.type).startswith("tuple"):
        return numbers
    return boolean if field.type is bool else field.type


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message):
        fail(f"{message} (python train.py --help lists all flags)")


def parse(arguments, description, presets, config):
    """Command line -> argparse's namespace. Every field of the class `config` is a flag.

    presets: their names; only flags of the config that were given are in the namespace.
    """
    parser = Parser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    add = parser.add_argument
    add("--phase", choices=PHASES, default="all")
    add("--preset", choices=presets, help="default: gpu where CUDA is there, else cpu")
    add("--run", help="folder of this run, default runs/default; with --checkpoint its folder, or "
        "runs/NAME where that is no run")
    add("--seed", type=int, help=f"training seed, default 0 [0 ... {MAX_SEED}]")
    add("--checkpoint", help="agent.pt to evaluate, dream with or play")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="where to train; auto: cuda where it is there, else cpu")
    add("--policy", help="collect: checkpoint of the policy that acts")
    add("--episodes", type=int, help="episodes to collect or to evaluate on")
    add("--length", type=int, default=48, help="frames of the dream's video [5 ... 10000]")
    add("--record", nargs="?", metavar="FILE", help="evaluate, dream: the video to write, .gif or "
        ".mp4, default RUN/policy.gif and RUN/dream.gif")
    add("--port", type=int, default=8000, help="port of the page to play on")
    group = parser.add_argument_group("config")
    for cls in (Config, config):
        source = inspect.getsource(cls)
        comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", source, re.M))
        for field in fields(cls):
            if field.name in comments:
                text = comments[field.name].replace("%", "%%")
                if bounds := config.range_of(field):
                    text += " [{:g} ... {:g}]".format(*bounds)
                group.add_argument(f"--{field.name}", type=flag_type(field), metavar="X",
                                   default=argparse.SUPPRESS, help=text)
    args = parser.parse_args(arguments)
    if args.episodes is not None and not 1 <= args.episodes <= 50_000:
        fail("--episodes must lie in 1 ... 50000")
    if not 5 <= args.length <= 10_000:
        fail("--length must lie in 5 ... 10000: four frames are context, memory holds the video")
    if args.record and Path(args.record).suffix not in (".gif", ".mp4"):
        fail(f"--record {args.record}: the name of a video ends in .gif or .mp4")
    for name, value in vars(args).items():
        if "\0" in str(value):
            fail(f"--{name}: a NUL byte cannot be in it")
        # without an environment: recorded data
        if value == "" and name != "env":
            fail(f"--{name}: nothing is given")
    if args.policy and args.phase != "collect":
        fail("--policy is for --phase collect; other phases take --checkpoint")
    args.settings = {field.name: getattr(args, field.name) for field in fields(config)
                     if hasattr(args, field.name)}
    return args


def run_folder(args):
    """--run, else the checkpoint's folder if that is a run, else a new one by its name."""
    if args.run:
        return Path(args.run)
    if not args.checkpoint:
        return Path("runs/default")
    checkpoint = Path(args.checkpoint)
    if (checkpoint.parent / "config.json").exists():
        return checkpoint.parent
    return Path("runs") / checkpoint.stem


def saved_settings(args, folder):
    """What --checkpoint or the run's config.json was made with; {} for a new run."""
    path = folder / "config.json"
    if args.checkpoint:
        is_foreign = os.path.dirname(os.path.realpath(args.checkpoint)) != os.path.realpath(folder)
        if is_foreign and path.exists() and args.phase not in READ_ONLY:
            fail(f"--checkpoint {args.checkpoint}, but {path} has settings already; use another "
                 "--run")
        state = load_checkpoint(args.checkpoint)
        actions = json.loads(state["actions"])
        return {"config": state["config"], "actions": actions, "seed": state["seed"]}
    if not os.path.lexists(path):
        return {}
    try:
        # a pipe would be waited for
        if not path.is_file():
            raise ValueError("it is no file")
        # JSON knows no NaN
        saved = json.loads(path.read_text(), parse_constant=int)
        # the defaults of the code must not fill gaps
        if not {field.name for field in fields(Config)} <= saved["config"].keys():
            raise ValueError("settings are missing")
        worlds.checked_sizes(saved["actions"])
        if type(saved["seed"]) is not int or type(saved["preset"]) is not str:
            raise ValueError(f"seed is {saved['seed']!r}, preset is {saved['preset']!r}")
        return saved
    except (OSError, *DAMAGED) as error:
        fail(f"{path} is damaged ({describe(error)}); delete it and give the flags again")


def make_config(config, settings):
    """config(**settings); what contradicts ends the program."""
    try:
        return config(**settings)
    except ValueError as error:
        fail(error)


def check_episodes(args, folder, saved, overrides):
    """Episodes that are there must go on being made as they were: settings saved say how."""
    if args.phase not in READ_ONLY and any(folder.glob("data/*.npz")):
        for name in ("env", "env_kwargs", "action_bins", "action_repeat", "image_size"):
            before = saved["config"].get(name, overrides.get(name))
            before = tuple(before) if isinstance(before, list) else before
            # data of a run without an environment may be of any
            if before != "" and name in overrides and before != overrides[name]:
                fail(f"--{name} {overrides[name]}, but the episodes in {folder / 'data'} were made "
                     f"with {before}; use another --run")


def open_run(args, presets, config):
    """The run that the command line names, with its settings. Five rules:

    1. The settings are those of --checkpoint or of the run's config.json, else the preset's.
    2. Every flag overrides one; but not another --preset or training --seed, and not the
       architecture of a checkpoint (run.Run.take_architecture).
    3. --action_spec means recorded data: no environment (unless --env names the one that it is
       from), and one round, as nobody collects more.
    4. A new run asks its environment: image_size keeps the proportions of the frames, and actions
       are repeated as worlds.action_repeat says, unless a flag says otherwise.
    5. A run that has episodes collects no others than such.
    """
    folder = run_folder(args)
    saved = saved_settings(args, folder)
    is_new = not saved
    preset = args.preset or ("gpu" if torch.cuda.is_available() else "cpu")
    # other tracks to evaluate on, or a new run with a checkpoint's settings, may have another seed
    seed = None if args.phase in READ_ONLY or args.checkpoint else args.seed
    for name, value in (("preset", args.preset), ("seed", seed)):
        if value is not None and saved.get(name, value) != value:
            fail(f"--{name} {value}, but {folder / 'config.json'} was made with {saved[name]}; "
                 "use another --run")
    saved = {"preset": preset, "config": presets[preset], "actions": None, "seed": 0} | saved
    if args.seed is not None:
        saved["seed"] = args.seed
    if not 0 <= saved["seed"] <= MAX_SEED:
        fail(f"--seed {saved['seed']} must lie in 0 ... {MAX_SEED}")
    overrides = dict(args.settings)
    if args.episodes is not None:
        # by hand, with --policy, collection leaves the settings of the rounds alone
        collected = [] if args.policy else ["collect_episodes"]
        counts = {"collect": collected, "evaluate": ["eval_episodes"]}
        every = ["collect_episodes", "round_episodes", "eval_episodes"]
        overrides |= dict.fromkeys(counts.get(args.phase, every), args.episodes)
    actions = saved["actions"]
    if "action_spec" in overrides:
        actions = {"sizes": list(overrides["action_spec"])}
        overrides.setdefault("env", "")
    if not is_new:
        check_episodes(args, folder, saved, overrides)
    spec = {} if actions is None else {"action_spec": worlds.action_sizes(actions)}
    try:
        cfg = make_config(config, saved["config"] | overrides | spec)
    except TypeError as error:
        path = args.checkpoint or folder / "config.json"
        fail(f"{path} has settings that this version does not know: {error}")
    if cfg.env and (actions is None or {"env", "env_kwargs", "action_bins"} & set(overrides)):
        seen, native = worlds.look_from_afar(cfg.env, cfg.env_kwargs, cfg.action_bins)
        if "action_spec" in overrides and (text := worlds.action_differences(actions, seen)):
            fail(f"--action_spec is not that of {cfg.env}: {text}")
        actions = seen
        if is_new and "action_repeat" not in overrides:
            cfg.action_repeat = worlds.action_repeat(cfg.env)
        if is_new and "image_size" not in overrides:
            cfg.image_size = worlds.proportional_size(native, cfg.image_size, cfg.patch)
        try:
            cfg.__post_init__()
        except ValueError as error:
            fail(f"{error}; give an --image_size, the frames of {cfg.env} are {native}")
        if tuple(native) != cfg.image_size:
            print0("frames are resized from {}x{} to {}x{}".format(*native, *cfg.image_size))
    if actions is None:
        fail("no environment and no recorded data: give --env or --action_spec")
    cfg.action_spec = worlds.action_sizes(actions)
    if not cfg.env:
        cfg.rounds = 1
    return Run(folder, cfg, saved["seed"], actions, saved["preset"], overrides, args.device)
