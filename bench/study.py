"""How true each routing's gradient is, and how true the teacher's cue: nobody has published either.

    python bench/study.py --n 16 --seed 99 --runs out          # ten minutes on two cores

Routing: the gradient of the cycle alone with respect to the adapter, as each routing gives it,
against the exact one, by back-propagation through the whole rollout: their cosine and the ratio of
their lengths at every node t of the training grid, for an adapter before training and for those of
--runs; and what a cycle costs.

The cue: |v_tgt - v_src| / |v_src|, and the cosine of the requested change with the true one, x - y,
where y is the renderer's, over t: asked at the source, where an edit begins, and at the true edit,
where it should end.

"make it winter" on held-out scenes with full captions. Writes bench/results/study.md.
"""

import argparse
import contextlib
import json
import pathlib
import time
from dataclasses import fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from evaluate import held_out, scenes  # puts the repository on the path, so first
from memory import Meter

from data import Batch, derive
from edits import change
from files.disk import write
from files.run import load_adapter, origin, read_run
from frozen.load import load_base
from frozen.vae import to_pixels
from losses import byg_loss, change_of, teacher
from model import merged, new_adapter
from routing import ROUTES, time_grid
from train import RECIPES

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
RECIPE = RECIPES["default"]
CUE = """## The cue

| t | strength | cosine with the true change, at the source: paper | delta \
| at the true edit: paper | delta |
|---|---|---|---|---|---|"""
ROUTING = """
## Routing: {}

Cosine with the exact gradient of the cycle (ratio of lengths). Last: of what goes through the \
forward edit alone, without the reverse edit's own gradient, which is the same.

| t | straight-through | one-step | detach | straight-through, forward edit alone |
|---|---|---|---|---|"""
COST = """
## What a cycle costs

Batch {}, the rollout of {} steps included; relative to detach.

| | time | memory |
|---|---|---|"""


# ---- the scenes ---------------------------------------------------------------------------------
def prepare(model, vae, text, n, seed):
    """-> a Batch of n held-out scenes, the latents y (n, C, H, W) of the true edits"""
    world = held_out("season", "winter", n, seed)
    rng = np.random.default_rng(seed)
    captions = [scenes.caption(s, rng, drop=0.0) for s in world]
    derived = [derive("make it winter", caption) for caption in captions]
    words = {
        "src": captions,
        "tgt": [tgt for tgt, _ in derived],
        "undo": [undo for _, undo in derived],
        "instr": ["make it winter"] * n,
        "null": [""] * n,
    }
    edited = [change(s, "season", "winter") for s in world]
    x, y = (vae.encode(to_pixels(np.stack([*map(scenes.render, w)]))) for w in (world, edited))
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    k = torch.zeros(n, dtype=torch.long)
    prompts = {kind: text(some) for kind, some in words.items()}
    return Batch(x, eps, eps, k, **prompts, frames=1), y


def first(batch, n):
    """The batch's first n scenes."""
    parts = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, tuple):
            value = tuple(a[:n] for a in value)
        elif isinstance(value, torch.Tensor):
            value = value[:n]
        parts[field.name] = value
    return Batch(**parts)


# ---- the cue ------------------------------------------------------------------------------------
def mean_cosine(a, b):
    """(B, C, H, W) -> number"""
    return F.cosine_similarity(a.flatten(1), b.flatten(1)).mean().item()


@torch.no_grad()
def cues(model, batch, y, t):
    """At one time t. -> the strength, then the cosines with the true change x - y of the paper's
    change and of the delta cue's, at the source and at the true edit y"""
    times = t.repeat(len(y))
    x_t = torch.lerp(batch.x, batch.eps, t)
    row = []
    for clean in (batch.x, y):
        y_t = torch.lerp(clean, batch.eps, t)
        v_src, v_tgt = teacher(model, times, (y_t, batch.src), (y_t, batch.tgt))
        if not row:
            lengths = [v.flatten(1).norm(dim=1) for v in (v_tgt - v_src, v_src)]  # (B,)
            row.append((lengths[0] / lengths[1]).mean().item())
        delta = change_of(model, batch, y_t, x_t, times, RECIPE.guidance)
        row += [mean_cosine(d, batch.x - y) for d in (v_tgt - v_src, delta)]
    return row


# ---- the routings -------------------------------------------------------------------------------
def no_cue(*_):
    """In place of a cue: the cycle alone."""
    return torch.zeros(()), torch.zeros(())


def gradient(model, adapter, batch, ts, routing, meter=contextlib.nullcontext):
    """Of the cycle, as one vector. A meter slows it, so its seconds say nothing.
    -> gradient, seconds, meter"""
    begun = time.time()
    with meter() as metered:
        now, average = merged(model, adapter), merged(model, adapter)
        loss, _ = byg_loss(model, now, average, batch, ts, no_cue, routing=routing)
        params = list(adapter.values())
        grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads]), time.time() - begun, metered


def beside(g, exact):
    """Cosine and ratio of lengths, for the table."""
    cos = F.cosine_similarity(g, exact, dim=0)
    return f"{cos:.2f} ({g.norm() / exact.norm():.2f})"


def begin(model, run, seed):
    """An editor to study, trained or not. -> adapter, its name in the table"""
    if run:
        adapter = load_adapter(pathlib.Path(run) / "adapter.safetensors", model)
        steps = read_run(pathlib.Path(run))["steps"]
        return {k: v.requires_grad_() for k, v in adapter.items()}, f"After {steps} steps ({run})"
    torch.manual_seed(seed)
    adapter = new_adapter(model, RECIPE.rank)
    with torch.no_grad():
        for name, v in adapter.items():
            if "lora_A" not in name:  # from zero there is no gradient in A: a little off it
                v.normal_(std=0.01)
    return adapter, "Before training"


def study_routing(model, adapter, batch, ts, seconds):
    """Yields a line of the table for each node; adds to the seconds of each routing."""
    for k, t in enumerate(ts[:-1]):
        at_k = replace(batch, k=torch.full_like(batch.k, k))
        found = {}
        for routing in ROUTES:
            found[routing], spent, _ = gradient(model, adapter, at_k, ts, routing)
            seconds[routing] += spent
        exact, reverse = found["backprop"], found["detach"]  # reverse: the reverse edit's own
        cells = [beside(found[routing], exact) for routing in ("ste", "onestep", "detach")]
        cells.append(beside(found["ste"] - reverse, exact - reverse))
        yield f"| {t:.3f} | {' | '.join(cells)} |"


def options():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--runs", nargs="*", default=[], help="trained editors of the embedded base")
    p.add_argument("--n", type=int, default=16, help="scenes; eight times as many for the cue (16)")
    p.add_argument("--seed", type=int, default=99, help="of the scenes and of the noise (99)")
    p.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder (bench/results)")
    return p.parse_args()


def main():
    o = options()
    model, vae, text, shift = load_base("tiny")
    ts = time_grid(RECIPE.n, shift)
    with torch.no_grad():
        batch, y = prepare(model, vae, text, 8 * o.n, o.seed)
    command = f"python bench/study.py --n {o.n} --seed {o.seed}"
    if o.runs:
        command += f" --runs {' '.join(o.runs)}"
    date, threads = time.strftime("%Y-%m-%d"), torch.get_num_threads()
    lines = []

    def say(line):
        lines.append(line)
        print(line, flush=True)

    say(f"`{command}`\n\nCommit {origin()['commit']}, {date}, {threads} threads.\n\n{CUE}")
    for t in ts[:-1]:
        cells = [f"{value:.2f}" for value in cues(model, batch, y, t)]
        say(f"| {t:.3f} | {' | '.join(cells)} |")

    batch = first(batch, o.n)
    seconds = dict.fromkeys(ROUTES, 0.0)
    for run in [None, *o.runs]:
        adapter, name = begin(model, run, o.seed)
        say(ROUTING.format(name))
        for line in study_routing(model, adapter, batch, ts, seconds):
            say(line)

    say(COST.format(o.n, RECIPE.n))
    peak = {}
    for routing in ROUTES:
        _, _, meter = gradient(model, adapter, batch, ts, routing, Meter)
        peak[routing] = meter.peak
    for routing in ROUTES:
        costs = (cost[routing] / cost["detach"] for cost in (seconds, peak))
        say(f"| {routing} | {' | '.join(f'{ratio:.2f}' for ratio in costs)} |")
    write(o.out / "study.md", "\n".join(lines) + "\n")
    print(json.dumps({"seconds": seconds, "peak": peak}))


if __name__ == "__main__":
    main()
