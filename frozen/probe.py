"""What the frozen base can say of an edit: before training whether it knows it, of a sample sheet
whether the edits are what was asked for; and what a run will cost."""

import itertools
import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from files.folder import one_line
from files.ranks import RANKS
from losses import teacher
from model import Adapter, MMDiT, Prompt
from routing import noise

TIMES = (0.95, 0.8, 0.6, 0.4, 0.2)  # the text acts mostly on the first: all are asked at
PICTURES = 8  # for the probe, or as many as it has the patience for
PATIENCE = 60  # seconds

# Of the embedded base's edits those it knows have a share above 0.6, those it does not know below
# 0.3; snowfall, which falls elsewhere under every noise, has an agreement of 0.65, others above 0.7
# (python bench/probe.py).
KNOWN, STEADY = 0.4, 0.68  # shares and agreements are means over t

# Of the embedded base's runs (the same command) those whose edits are pictures, copies too, have a
# surprise of 1.0 to 1.8, those that draw what is no picture 3.4 and more.
SURPRISED = 2.5


# ---- before training ----------------------------------------------------------------------------
@torch.no_grad()
def probe(model: MMDiT, data, rows: Tensor) -> tuple[list[dict], float]:
    """The cue of the first few of `rows`, by t, largest first: strength |v_tgt - v_src| / |v_src|;
    share, the same over |v_src - v_null|, what the whole caption brings; agreement, the cosine of
    v_tgt - v_src under two noises. -> a dict for each t, seconds of one picture's pass"""
    device = model.proj_out.weight.device
    x = torch.cat([data.latents[i][:1] for i in rows[:PICTURES]]).to(device)  # a clip's first frame
    rows = rows[: affordable(model, x[:1], data.prompt("src", rows[:1], device))]
    x = x[: len(rows)]
    src, tgt, null = (data.prompt(kind, rows, device) for kind in ("src", "tgt", "null"))
    generator = torch.Generator().manual_seed(2)
    noises = [noise(len(x), 1, x.shape[1:], generator).to(device) for _ in range(2)]
    table, begun = [], time.monotonic()
    for t in TIMES:
        changes = []
        for eps in noises:
            x_t = torch.lerp(x, eps, t)
            times = torch.full((len(x),), t, device=device)
            # one by one: together they would need more memory than a step of a small batch
            v_src, v_tgt, v_null = (
                teacher(model, times, (x_t, prompt))[0].flatten(1) for prompt in (src, tgt, null)
            )  # (B, C H W)
            changes.append(v_tgt - v_src)
        change = changes[-1].norm(dim=1).mean()
        figures = {
            "strength": change / v_src.norm(dim=1).mean(),
            "share": change / (v_src - v_null).norm(dim=1).mean(),
            "agreement": F.cosine_similarity(*changes).mean(),
        }
        table.append({"t": t} | {name: round(v.item(), 3) for name, v in figures.items()})
    return table, (time.monotonic() - begun) / (6 * len(TIMES) * len(x))


def affordable(model: MMDiT, x: Tensor, prompt: Prompt) -> int:
    """How many pictures the probe has time for, by a pass of the one in x; the first warms up."""
    t = torch.ones(1, device=x.device)
    for _ in range(2):
        begun = time.monotonic()
        (v,) = teacher(model, t, (x, prompt))
        v.sum().item()  # waits for the device
    seconds = 6 * len(TIMES) * (time.monotonic() - begun)  # of a picture in the probe
    return max(1, min(PICTURES, int(PATIENCE / seconds)))


def verdict(table: list[dict], src: str, tgt: str) -> str:
    """The probe as text: a line for each t, and a sentence where the base does not know the edit.
    src, tgt: captions of one of the pictures"""
    names = ("strength", "share", "agreement")
    lines = ["the cue, by t:   " + "  ".join(f"{name:>9}" for name in names)]
    for row in table:
        lines.append(f"         {row['t']:.2f}    " + "  ".join(f"{row[n]:9.2f}" for n in names))
    share, agreement = (sum(row[n] for row in table) / len(table) for n in names[1:])
    pair = f'"{one_line(src, 60)}" from "{one_line(tgt, 60)}"'
    if share < KNOWN:
        lines.append(
            f"warning: the base hardly tells {pair}: the change is {100 * share:.0f} % of what a "
            "whole caption brings. What it does not know cannot be learnt: try other words, --tgt"
        )
    elif agreement < STEADY:
        lines.append(
            f"warning: the base tells {pair}, but changes other places under other noise "
            f"(agreement {agreement:.2f}): snowfall and the like come out weak; try --cue delta-own"
        )
    return "\n".join(lines)


def say(model: MMDiT, adapter: Adapter, data, rows: Tensor, recipe, frames: int) -> list[dict]:
    """The probe, and what the run will cost, on stderr. -> the probe's table, for the page"""
    table, seconds = probe(model, data, rows)
    row = data.rows[rows[0]]
    pictures = recipe.batch // RANKS * frames
    duration = tqdm.format_interval(recipe.steps * pictures * passes(recipe) * seconds)
    memory = gib(model, adapter, pictures, data.latents[0].shape[-2:], recipe)
    cost = f"{recipe.steps} steps take about {duration} and {memory:.1f} GiB here (estimated)"
    print(f"{verdict(table, row['src'], row['tgt'])}\n{cost}", file=sys.stderr)
    return table


# ---- of a sample sheet --------------------------------------------------------------------------
@torch.no_grad()
def judge(model: MMDiT, x: Tensor, y: Tensor, src: Prompt, tgt: Prompt) -> tuple[Tensor, Tensor]:
    """The base's flow loss, at fixed noises, on the edits y of the sources x. All (B, ...).
    -> margin (B,): above 0 where y is likelier under tgt than under src; surprise (B,): the loss on
    y under tgt, in units of that on x under src"""
    generator = torch.Generator().manual_seed(3)
    margin, losses, usual = (torch.zeros(len(x), device=x.device) for _ in range(3))
    for t in TIMES:
        times = torch.full((len(x),), t, device=x.device)
        eps = noise(1, len(x), x.shape[1:], generator).to(x.device)
        x_t, y_t = torch.lerp(x, eps, t), torch.lerp(y, eps, t)
        v_src, v_tgt, v_x = teacher(model, times, (y_t, src), (y_t, tgt), (x_t, src))
        under_src, under_tgt = square(v_src - (eps - y)), square(v_tgt - (eps - y))
        margin += (under_src - under_tgt) / (under_src + under_tgt)
        losses += under_tgt
        usual += square(v_x - (eps - x))
    return margin, losses / usual


def square(error: Tensor) -> Tensor:
    """(B, C, H, W) -> its mean square (B,)"""
    return error.pow(2).flatten(1).mean(1)


def warnings_of(figures: dict, late: bool = True) -> list[str]:
    """What a sheet's figures (files/run.py) say of the run, where it goes wrong. late: in the
    second half of a run; before, the edit need not be there"""
    if not math.isfinite(figures["surprise"]):
        return ["the edits are no numbers: try --dtype fp32, or bf16"]
    if not late:
        return []
    said = []
    if figures["likelier"] <= 0.5:
        share = f"{100 * figures['likelier']:.0f} %"
        said.append(
            f"to the base {share} of the edits look more like the target caption than like the "
            "source's: they may be nearly copies; raise --prior or --lr"
        )
    if figures["surprise"] > SURPRISED:
        times = f"{figures['surprise']:.1f} times"
        said.append(
            f"the edits surprise the base {times} as much as the sources: they are drifting "
            "from pictures; lower --lr, raise --identity"
        )
    return said


# ---- what it will cost --------------------------------------------------------------------------
def passes(recipe) -> float:
    """A step's forward passes, of one picture of the batch."""
    rolled = recipe.n * recipe.bootstrap
    with_gradient = 2 + recipe.identity_share
    # a pass, again for its activations, and backward
    return rolled + queries(recipe) + 3 * with_gradient


def queries(recipe) -> int:
    """To the teacher, in a step: four of the paper's cue, three of the default's."""
    return 4 if recipe.cue == "cosine" else 3


def gib(model: MMDiT, adapter: Adapter, pictures: int, size: tuple[int, int], recipe) -> float:
    """About the most memory of a step with checkpointing, in GiB: the weights; the adapter with its
    average, gradient, moments and a copy in half precision; and, of width D for each token, the
    blocks' inputs and what the teacher's batch needs. Within 0.6 % of what bench/memory.py counts
    for bases of SD3's family under CUDA."""
    h, w = size  # latent pixels
    tokens = pictures * (h // model.patch * (w // model.patch) + 78)
    kept = 2 * len(model.transformer_blocks) + 15 * queries(recipe) + 3
    item = model.proj_out.weight.itemsize
    weights = sum(p.nbytes for p in itertools.chain(model.parameters(), model.buffers()))
    tensors = 22 * sum(v.numel() for v in adapter.values())
    return (weights + tensors + tokens * model.width * item * kept) / 2**30
