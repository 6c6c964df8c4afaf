"""ByG beside its peers on the same base: following the cue, SDEdit, FlowEdit, and true pairs.

    python bench/baselines.py --run out --n 200 --seed 555    # goes on where it was stopped

copy        the source, unchanged
ByG         the adapter of --run, trained without pairs
the cue     followed without training (bench/cue.py), under one or two noises at each of 8 nodes
SDEdit      (arXiv 2108.01073) noises the source to the time t = strength of the shifted grid, then
            denoises it under the target caption with guidance
FlowEdit    (arXiv 2412.08629, Algorithm 1, one draw of noise at a step) the ODE of
            v(z_tgt, tgt) - v(z_src, src), from t = start
supervised  the adapter, optimizer, rate, batch and number of steps of --run, on N pairs of a source
            and its truth that the renderer draws

Every method makes the same edit of the same held-out scenes; captions name everything. Judged as in
bench/evaluate.py.
"""

import argparse
import json
import pathlib
import re
import sys
import time
import zlib
from dataclasses import dataclass, replace
from functools import partial

import cue
import numpy as np
import torch
import torch.nn.functional as F
from evaluate import asked, edit_all, held_out, judge_all, of_each, page, scenes, summary
from torch import Tensor

from data import derive
from edits import change
from files.disk import UserError, read_json, write
from files.pictures import write_image
from files.run import find_run, load_adapter, read_run
from frozen.load import edit_steps, load_base
from frozen.vae import VAE, to_images, to_pixels
from model import MMDiT, Prompt, merged, new_adapter
from routing import integrate, time_grid
from sample import base, guided
from train import RECIPES, Muon, set_rate, update_average

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
WORK = pathlib.Path(__file__).resolve().parent / "work" / "baselines"  # pictures of what is done
SHOWN = 12  # scenes of the picture
CUE = (8, 3.0)  # nodes and guidance, as in training
STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9)  # of SDEdit
FLOWEDIT = (  # start, guidance of source and target
    (0.75, 1.5, 3.0),
    (0.85, 1.5, 3.0),
    (0.9, 1.0, 1.5),
)


# ---- the peers ----------------------------------------------------------------------------------
def from_time(start, steps, shift):
    """The nodes of a sampling grid below `start`, beginning with it. -> (nodes,)"""
    ts = time_grid(steps, shift)
    return torch.cat([torch.tensor([start]), ts[ts < start - 1e-3]])


def sdedit(model, x, tgt, null, strength, guidance, ts, generator):
    """x (B, C, H, W), ts falling from the strength to 0. -> the edit (B, C, H, W)"""
    eps = torch.randn(x.shape, generator=generator)
    velocity = guided(base(model, tgt), base(model, null), guidance)
    *_, y = integrate(velocity, torch.lerp(x, eps, strength), ts)
    return y


def flowedit(model, x, src, tgt, null, w_src, w_tgt, ts, generator):
    """x (B, C, H, W), w_src, w_tgt: guidance, ts falling from the start to 0. -> (B, C, H, W)"""
    v_null = base(model, null)
    v_src = guided(base(model, src), v_null, w_src)
    v_tgt = guided(base(model, tgt), v_null, w_tgt)
    y = x
    for t, t_next in zip(ts, ts[1:]):
        times = t.repeat(len(x))
        x_t = torch.lerp(x, torch.randn(x.shape, generator=generator), t)
        y_t = y + x_t - x
        y = y + (t_next - t) * (v_tgt(y_t, times) - v_src(x_t, times))
    return y


def supervised(model, prompt, sources, truths, recipe, shift, seed):
    """Flow matching on true pairs (N, C, H, W), with ByG's adapter, optimizer and number of steps.
    prompt: of 1, for all. -> the averaged adapter"""
    torch.manual_seed(seed)
    adapter = new_adapter(model, recipe.rank)
    params = list(adapter.values())
    average = {name: v.detach().clone() for name, v in adapter.items()}
    opt = Muon(params, recipe.lr, recipe.weight_decay)
    ts = time_grid(recipe.n, shift)
    for step in range(1, recipe.steps + 1):
        set_rate(opt, step, recipe)
        b = torch.randint(len(sources), (recipe.batch,))
        t = ts[torch.randint(recipe.n, (recipe.batch,))]
        x, y = sources[b], truths[b]
        eps = torch.randn_like(y)
        y_t = torch.lerp(y, eps, t[:, None, None, None])
        words = [of_each(a, x) for a in prompt]
        v = model(y_t, t, words, x, merged(model, adapter))
        F.mse_loss(v, eps - y).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        opt.zero_grad()
        update_average(average, adapter, recipe.ema, step)
    return average


# ---- what is compared ---------------------------------------------------------------------------
@dataclass
class Task:  # what every method is given, and the base
    model: MMDiT
    vae: VAE
    shift: float  # of the time grid
    kind: str  # what the edit changes
    value: str  # to what
    seed: int
    world: list  # n scenes
    images: np.ndarray  # of them (n, h, w, 3) uint8
    x: Tensor  # their latents (n, C, H, W)
    src: Prompt  # their captions
    tgt: Prompt  # captions of the results
    null: Prompt  # no words, n times
    instr: Prompt  # of 1, for all


def encode(vae, pictures):
    return vae.encode(to_pixels(np.stack(pictures)))


@torch.no_grad()
def prepare(o, config):
    """-> Task"""
    instr = config["instr"]
    kind, value = asked(instr)
    model, vae, text, shift = load_base(config["base"])
    world = held_out(kind, value, o.n, o.seed)
    images = np.stack([scenes.render(s) for s in world])
    rng = np.random.default_rng(o.seed)
    captions = [scenes.caption(s, rng, drop=0.0) for s in world]
    targets = [derive(instr, caption)[0] for caption in captions]
    x = encode(vae, images)
    null = tuple(of_each(a, x) for a in text([""]))
    prompts = (text(captions), text(targets), null, text([instr]))
    return Task(model, vae, shift, kind, value, o.seed, world, images, x, *prompts)


def edit_by(task, adapter):
    how = (task.instr, task.shift, edit_steps(task.model), task.seed)
    return edit_all(task.model, task.vae, adapter, task.images, *how)


@torch.no_grad()
def edit_free(task, method, *args, **more):
    """By a method that needs no training."""
    generator = torch.Generator().manual_seed(task.seed)
    y = method(task.model, task.x, *args, generator=generator, **more)
    return to_images(task.vae.decode(y))


def edit_supervised(task, recipe, n):
    """By an editor trained on n pairs of scenes that are not among the held out: another stream of
    the same seed."""
    before = held_out(task.kind, task.value, n, task.seed + 10**6)
    after = [change(s, task.kind, task.value) for s in before]
    with torch.no_grad():
        pairs = [encode(task.vae, [scenes.render(s) for s in world]) for world in (before, after)]
    adapter = supervised(task.model, task.instr, *pairs, recipe, task.shift, task.seed)
    return edit_by(task, adapter)


def methods(task, o, run, config):
    """{name: function without arguments -> edits (n, h, w, 3) uint8}, in the table's order"""
    src, tgt, null = task.src, task.tgt, task.null
    adapter = load_adapter(run / "adapter.safetensors", task.model)
    found = {
        "copy": lambda: task.images,
        f"ByG ({o.run}, no pairs)": partial(edit_by, task, adapter),
    }
    nodes, guidance = CUE
    for draws, noises in ((1, "one noise"), (2, "two noises")):
        args = (src, tgt, null, guidance, time_grid(nodes, task.shift))
        name = f"the cue followed without training, {noises}"
        found[name] = partial(edit_free, task, cue.follow, *args, draws=draws)
    for strength in STRENGTHS:
        ts = from_time(strength, o.steps, task.shift)
        found[f"SDEdit, strength {strength}"] = partial(
            edit_free, task, sdedit, tgt, null, strength, 4.5, ts
        )
    for start, w_src, w_tgt in FLOWEDIT:
        ts = from_time(start, o.steps, task.shift)
        name = f"FlowEdit from t = {start}, guidance {w_src:g} and {w_tgt:g}"
        found[name] = partial(edit_free, task, flowedit, src, tgt, null, w_src, w_tgt, ts)
    numbers = {name: config[name] for name in ("steps", "batch", "lr", "rank", "n")}
    recipe = replace(RECIPES["default"], **numbers)  # what --run may have changed
    for n in o.pairs:
        found[f"supervised, {n} pairs"] = partial(edit_supervised, task, recipe, n)
    return found


def options():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--run", default="out", help="an editor that train.py made of pictures (out)")
    p.add_argument("--n", type=int, default=200, help="scenes (200)")
    seed = "of the scenes, the noise and the supervised trainings (555)"
    p.add_argument("--seed", type=int, default=555, help=seed)
    p.add_argument("--steps", type=int, default=28, help="of SDEdit and FlowEdit (28)")
    pairs = "true pairs of each supervised training (64)"
    p.add_argument("--pairs", type=int, nargs="+", default=[64], help=pairs)
    p.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder (bench/results)")
    return p.parse_args()


def main():
    o = options()
    run = find_run(o.run)
    config = read_run(run)
    if not config["instr"]:
        raise UserError(f"{run} is a general editor; this compares editors of one instruction", 2)
    task = prepare(o, config)
    command = f"python bench/baselines.py --run {o.run} --n {o.n} --seed {o.seed} --steps {o.steps}"
    adapter = zlib.crc32((run / "adapter.safetensors").read_bytes())
    made_from = {"command": command, "adapter": adapter}
    file = o.out / "baselines.json"
    old = read_json(file) if file.exists() else {}
    done = old["methods"] if old | made_from == old else {}
    work = WORK / f"{zlib.crc32(json.dumps(made_from).encode()):08x}"
    work.mkdir(parents=True, exist_ok=True)
    table, rows = {}, [task.images[:SHOWN]]
    for name, method in methods(task, o, run, config).items():
        pictures = work / (re.sub(r"[^a-z0-9.]+", "-", name.lower()) + ".npy")
        if name not in done or not pictures.exists():
            begun = time.time()
            output = method()
            seconds = round(time.time() - begun)
            results = judge_all(task.world, [task.kind] * o.n, [task.value] * o.n, output)
            done[name] = summary(results) | {"seconds": seconds}
            np.save(pictures, output[:SHOWN])
            write(file, json.dumps(made_from | {"methods": done}, indent=1) + "\n")
            print(
                f"{name}: success {100 * done[name]['success']:.1f} %, "
                f"preservation {done[name]['preservation_db']} dB, "
                f"truth {done[name]['psnr_truth_db']:.1f} dB",
                flush=True,
            )
        table[name] = done[name]
        rows.append(np.load(pictures))
    rows.append([scenes.render(change(s, task.kind, task.value)) for s in task.world[:SHOWN]])
    write_image(o.out / "baselines.png", scenes.sheet([list(row) for row in rows]))
    about = (
        f'"{config["instr"]}", {o.n} held-out scenes, 95 % intervals over scenes. '
        "Picture: the source, a row for each method in this order, the truth."
    )
    text = page(table, f"`{command} --pairs {' '.join(map(str, o.pairs))}`\n\n{about}")
    made = config["made"]
    text += f"\nByG's editor was made by commit {made['commit']}, {made['machine']}.\n"
    write(o.out / "baselines.md", text)
    print(json.dumps({name: figures["success"] for name, figures in table.items()}))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"baselines.py: {error}", file=sys.stderr)
        sys.exit(error.code)
