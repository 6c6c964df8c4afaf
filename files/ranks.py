"""Several processes as one run: the ranks of torchrun, what they agree on, and who speaks."""

import contextlib
import datetime
import os
import signal
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from files.disk import UserError, why

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun
LOCAL = int(os.environ.get("LOCAL_RANK", RANK))  # rank in this machine; its first speaks for all
LOCALS = int(os.environ.get("LOCAL_WORLD_SIZE", RANKS))  # ranks in this machine


def meet(device: torch.device) -> None:
    """Joins the other ranks, by the device's own way: NCCL, XCCL, or gloo on the CPU."""
    if RANKS == 1:
        return
    backend = dist.get_default_backend_for_device(device)
    own = None if backend == "gloo" else device
    patience = datetime.timedelta(minutes=10)  # rank 0 draws sheets meanwhile
    dist.init_process_group(backend, timeout=patience, device_id=own)


def guard(command: str, main: Callable) -> None:
    """Runs a command: what goes wrong in the user's world becomes one sentence and an exit code; at
    the end the other ranks are left."""
    code = 0
    try:
        main()
    except UserError as error:  # all ranks meet it, so one of each machine says it
        said, code = "" if LOCAL else str(error), error.code
    except RuntimeError as error:  # of MPS it has no class of its own
        if "out of memory" not in str(error):
            raise
        said, code = f"{why(error)} Try a smaller --size or, to train, --batch.", 1
    except KeyboardInterrupt:  # while pictures are read; in the loop the step is ended and saved
        said, code = "", 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if code:
        if said:
            print(f"{command}: {said}", file=sys.stderr)
        sys.exit(code)


def share(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its mean over the ranks of torchrun: that of the whole batch."""
    if RANKS == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    try:
        dist.all_reduce(flat)
    except RuntimeError as error:
        gone = f"another rank of this run has ended ({why(error)})"
        raise UserError(f"{gone}; go on from the last save with --resume")
    for t, mean in zip(tensors, (flat / RANKS).split([t.numel() for t in tensors])):
        t.copy_(mean.view_as(t))


def say(text: str) -> None:
    if RANK == 0:
        tqdm.write(text, file=sys.stderr)


def progress(first: int, last: int) -> tqdm:
    """The steps after `first` up to `last`, with a bar on stderr."""
    steps = range(first + 1, last + 1)
    return tqdm(steps, initial=first, total=last, file=sys.stderr, unit="step", disable=RANK > 0)


def show(bar: tqdm, figures: dict[str, float]) -> None:
    bar.set_postfix({name: f"{value:.3g}" for name, value in figures.items()}, refresh=False)


def quiet():
    """Only a machine's first rank speaks while the run is prepared."""
    return contextlib.redirect_stderr(open(os.devnull, "w")) if LOCAL else contextlib.nullcontext()


def agree(figures: dict[str, Tensor], stop: list, device) -> tuple[dict[str, float], bool]:
    """-> the figures of the whole batch, and whether any rank was told to stop"""
    told = torch.tensor(float(len(stop)), device=device)
    values = torch.stack([*figures.values(), told])
    share([values])
    *means, told = values.tolist()
    return dict(zip(figures, means)), told > 0


def catch_signals() -> list[int]:
    """Ctrl-C and SIGTERM let the step be finished and saved; a second one ends at once.
    -> a list that they will be added to"""
    caught = []

    def note(number, _):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return caught
