"""Files, processes, and how the program ends: nothing here is about Dreamer 4.

Files are written as a whole or not at all. What cannot be read ends the program with one line that
says what is wrong, where, and what to do. Ctrl-C and SIGTERM are noted here, and looked at between
two steps.
"""
import argparse
import contextlib
import datetime
import json
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# Signals received so far
STOP = []


def fail(message):
    """Ends the program with one line: what is wrong, where, and what to do."""
    # a path may hold line breaks
    print("error:", *str(message).splitlines(), file=sys.stderr, flush=True)
    raise SystemExit(2)


def describe(error):
    """An error's kind and text as part of one line, at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def new_parser(description):
    """The command line of a script: argparse with errors of one line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.error = fail
    return parser


def flush_output():
    """Raises an OSError here where nobody reads the output, and not once more when Python ends."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


@contextlib.contextmanager
def in_one_line():
    """One line where memory or a disk is full, and a quiet end on Ctrl-C or SIGTERM."""
    # files opened later must not take the place of a closed stdin, stdout or stderr
    while (lowest := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(lowest)
    # None where it is closed
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # a terminal that cannot show ± is no reason to stop
        stream.reconfigure(errors="backslashreplace")
    # as Ctrl-C: temporary files are removed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        try:
            yield
        finally:
            flush_output()
    except KeyboardInterrupt:
        # while train.py works, signals are only noted; a script just ends
        raise SystemExit(130) from None
    except OSError as error:
        # a full disk while logging, for example
        fail(f"{error}; is there room, may you write there, and is it no file, no device?")
    except (MemoryError, RuntimeError, ValueError) as error:
        # torch on CPUs and NumPy have no class of their own for it
        signs = ("allocate", "out of memory", "Storage size", "array is too big", "Maximum allowed")
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if "C++ compiler" in str(error):
            fail("--compile true needs a C++ compiler such as g++, and finds none; install one, or "
                 "give --compile false")
        if not is_memory and not any(sign in str(error) for sign in signs):
            raise
        fail("not enough memory for these settings; make --batch_size, --tokenizer_batch, "
             "--rollouts, --envs, --image_size or --width smaller, or --memory_gb, or give "
             f"--checkpointing true ({' '.join(str(error).split())[:100]})")


def limit_memory():
    """On Linux: what the machine's memory cannot hold becomes an error that in_one_line() ends.

    Otherwise the kernel would kill a process, this one or another, without a word.
    """
    # CUDA maps more than it uses
    if sys.platform == "linux" and not torch.cuda.is_available():
        import resource
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard == resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_DATA, (int(0.9 * whole), hard))


def check_stop(stop=STOP):
    """Ends the program after a signal. stop: what several processes agreed on, in its place."""
    if stop:
        print0("stopped; the same command continues")
        raise SystemExit(130)


def is_main_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier():
    """Waits for the other processes."""
    if dist.is_initialized():
        dist.barrier()


def is_launched():
    """Whether torchrun has started this process."""
    return dist.is_torchelastic_launched() and {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def init_distributed(device):
    """Joins the other processes, if torchrun has started several. device: of --device."""
    if not is_launched():
        return
    backend = "gloo"
    if device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl"
    # the others wait while one collects
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))


def print0(text):
    """Prints on the main process only."""
    if is_main_process():
        print(text, flush=True)


def to_json(numbers):
    """A line of JSON, which knows neither NaN nor infinity: null stands for what is unknown."""
    finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x
              for name, x in numbers.items()}
    return json.dumps(finite, allow_nan=False)


def append_to(path):
    """Opens a text file to add lines to it."""
    # a pipe would be waited for
    if Path(path).exists() and not Path(path).is_file():
        raise OSError(f"{path} is no file")
    return open(path, "a", newline="")


def write_file(path, write):
    """write(file) to a temporary name, then rename: a file is there as a whole or not at all."""
    path = Path(path)
    temporary = path.parent / f".{path.name}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a pipe of this name would be waited for
        temporary.unlink(missing_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as RuntimeError
        fail(f"{path} could not be written ({error}); the file from before, if any, is intact. "
             "Free some space, or name a place where you may write, and try again")
    finally:
        # it is there no more, unless something broke off, Ctrl-C included
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class Episode(dict):
    """The arrays of one episode. Frames that memory has no room for are read when asked for."""

    def __missing__(self, name):
        return load_episode(*self["source"])[name]


def load_episode(path, cfg):
    """Reads and checks one episode file; the format is in the README."""
    try:
        # a pipe would be waited for
        if not Path(path).is_file():
            raise ValueError("it is no file")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("frames", "actions", "rewards", "terminal")}
        if {type(array) for array in arrays.values()} != {np.ndarray}:
            raise ValueError("its entries are no arrays")
    except Exception as error:
        fail(f"episode file {str(path)!r} is damaged or no episode ({describe(error)}); delete it "
             "or make it again")
    episode = Episode(arrays, source=(path, cfg))
    T, A = episode["rewards"].size, len(cfg.action_spec)
    wanted = {"frames": ((T, *cfg.image_size, 3), np.uint8), "actions": ((T, A), np.int16),
              "rewards": ((T,), np.float32), "terminal": ((), np.bool_)}
    for name, (shape, dtype) in wanted.items():
        array = episode[name]
        if array.shape != shape or array.dtype != dtype:
            fail(f"episode file {path}: {name} is {array.shape} {array.dtype}, this run wants "
                 f"{shape} {np.dtype(dtype)}; convert it, or set --image_size or --action_spec")
    actions = episode["actions"]
    if (actions < -1).any() or (actions >= np.array(cfg.action_spec)).any():
        fail(f"episode file {path}: actions outside of the action spec {cfg.action_spec}; "
             "use another --run")
    # float32 must hold sums of them as well
    if T == 0 or not (np.abs(episode["rewards"]) < 1e30).all():
        fail(f"episode file {path}: rewards are missing, not finite or 1e30 and more; delete it or "
             "make it again")
    return episode
