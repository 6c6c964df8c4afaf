"""ByG beside its peers on the same base: copying, SDEdit, FlowEdit, and supervised training on true pairs.

    python bench/baselines.py --run out --n 200 --seed 555        # about half an hour on two cores; goes on where it was stopped

copy        the source, unchanged
SDEdit      (arXiv 2108.01073) noise the source to the time t = strength of the shifted grid, denoise under the target caption with guidance
FlowEdit    (arXiv 2412.08629, Algorithm 1, one draw of noise a step) the ODE of v(z_tgt, tgt) - v(z_src, src), from t = start
supervised  the same adapter, optimizer and number of steps as ByG's, on N pairs (source, truth) that the renderer draws
ByG         the adapter of --run, trained without pairs
Every method is asked for the same edit of the same held-out scenes; captions name everything. Judged as in bench/evaluate.py.
"""

import argparse
import json
import pathlib
import re
import sys
import time
import zlib

import numpy as np
import torch
from evaluate import (
    UserError,
    asked,
    edit_all,
    held_out,
    judge_all,
    page,
    scenes,
    summary,
)  # puts the repository on the path, so first

from data import derive  # isort: skip
from edits import change
from files.disk import read_json  # noqa: E402
from files.run import load_adapter  # noqa: E402
from frozen.load import load_base  # noqa: E402
from frozen.vae import to_images, to_pixels
from model import merged, new_adapter
from routing import integrate, time_grid
from sample import answers, guided
from train import RECIPES, new_optimizer, set_rate

WORK = (
    pathlib.Path(__file__).resolve().parent / "work" / "baselines"
)  # pictures of methods that are done
RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def from_time(start, steps, shift):
    """The nodes of a sampling grid below `start`, beginning with it."""
    ts = time_grid(steps, shift)
    return torch.cat([torch.tensor([start]), ts[ts < start - 1e-3]])


def sdedit(model, x, tgt, null, strength, w, steps, shift, noise):
    eps, ts = torch.randn(x.shape, generator=noise), from_time(strength, steps, shift)
    *_, y = integrate(guided(answers(model, tgt, null), w), torch.lerp(x, eps, strength), ts)
    return y


def flowedit(model, x, src, tgt, null, start, w_src, w_tgt, steps, shift, noise):
    v_src, v_tgt, y = (
        guided(answers(model, src, null), w_src),
        guided(answers(model, tgt, null), w_tgt),
        x,
    )
    for t, t_next in zip(ts := from_time(start, steps, shift), ts[1:]):
        x_t, times = torch.lerp(x, torch.randn(x.shape, generator=noise), t), t.repeat(len(x))
        y = y + (t_next - t) * (v_tgt(y + x_t - x, times) - v_src(x_t, times))
    return y


def supervised(model, vae, prompt, pairs, o, shift, seed):
    """Flow matching on true pairs with ByG's adapter, optimizer and numbers of steps. pairs: (source, truth) latents -> averaged adapter"""
    torch.manual_seed(seed)
    adapter = new_adapter(model, o.rank)
    average, params = {k: v.detach().clone() for k, v in adapter.items()}, list(adapter.values())
    opt, ts = new_optimizer(adapter, o), time_grid(o.n, shift)
    for step in range(1, o.steps + 1):
        set_rate(opt, step, o)
        b, t = torch.randint(len(pairs[0]), (o.batch,)), ts[torch.randint(o.n, (o.batch,))]
        x, y = (a[b] for a in pairs)
        eps = torch.randn_like(y)
        v = model(
            torch.lerp(y, eps, t[:, None, None, None]),
            t,
            tuple(a.expand(o.batch, *a.shape[1:]) for a in prompt),
            x,
            merged(model, adapter),
        )
        (v - (eps - y)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        opt.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), params, 1 - min(o.ema, step / (step + 10)))
    return average


def main():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--run", default="out", help="an editor that train.py made of the embedded base")
    p.add_argument("--n", type=int, default=200, help="scenes")
    p.add_argument(
        "--seed",
        type=int,
        default=555,
        help="of the scenes, the noise and the supervised trainings",
    )
    p.add_argument(
        "--steps",
        type=int,
        default=28,
        help="Euler steps of SDEdit and FlowEdit; the editors take 20",
    )
    p.add_argument("--pairs", type=int, nargs="+", default=[16, 64, 256, 1024])
    o = p.parse_args()
    run = pathlib.Path(o.run)
    if not (run / "adapter.safetensors").exists():
        raise UserError(f"{run} holds no trained adapter; train one with train.py first", 2)
    config = read_json(run / "config.json")
    if not config["instr"]:
        raise UserError(f"{run} is a general editor; this compares editors of one instruction", 2)
    (kind, value), instr = asked(config["instr"]), config["instr"]
    model, vae, text, shift = load_base(config["base"])
    world, rng = held_out(kind, value, o.n, o.seed), np.random.default_rng(o.seed)
    images = np.stack([scenes.render(s) for s in world])
    captions = [scenes.caption(s, rng, drop=0.0) for s in world]
    encode = lambda pictures: vae.encode(to_pixels(pictures))
    with torch.no_grad():
        src, tgt, null, prompt = (
            text(captions),
            text([derive(instr, c)[0] for c in captions]),
            text([""] * o.n),
            text([instr]),
        )
        x = encode(images)
    recipe = argparse.Namespace(
        **RECIPES["tiny"] | {k: config[k] for k in RECIPES["tiny"] if k in config}
    )
    noise = lambda: torch.Generator().manual_seed(o.seed)
    edited = lambda adapter: edit_all(model, vae, adapter, list(images), prompt, shift, 20, o.seed)

    def trained_on(n):
        """N pairs of scenes that are not among the held out: another stream of the same seed."""
        others = held_out(kind, value, n, o.seed + 10**6)
        with torch.no_grad():
            pairs = [
                encode(np.stack([scenes.render(s) for s in some]))
                for some in (others, [change(s, kind, value) for s in others])
            ]
        return edited(supervised(model, vae, prompt, pairs, recipe, shift, o.seed))

    def free(f, *args):
        with torch.no_grad():
            y = f(model, x, *args, o.steps, shift, noise())
            return to_images(vae.decode(y))

    methods = {
        "copy": lambda: images,
        f"ByG ({o.run}, no pairs)": lambda: edited(
            load_adapter(run / "adapter.safetensors", model)[0]
        ),
    }
    for s in (0.5, 0.6, 0.7, 0.8, 0.9):
        methods[f"SDEdit, strength {s}"] = lambda s=s: free(sdedit, tgt, null, s, 4.5)
    for start, w_src, w_tgt in (
        (0.75, 1.5, 3.0),
        (0.85, 1.5, 3.0),
        (0.95, 1.5, 3.0),
        (0.85, 3.5, 13.5),
        (0.9, 1.0, 1.5),
    ):
        methods[f"FlowEdit from t = {start}, guidance {w_src:g} and {w_tgt:g}"] = (
            lambda a=(start, w_src, w_tgt): free(flowedit, src, tgt, null, *a)
        )
    for n in o.pairs:
        methods[f"supervised, {n} pairs"] = lambda n=n: trained_on(n)
    RESULTS.mkdir(exist_ok=True)
    file, done, rows = RESULTS / "baselines.json", {}, [images[:12]]
    WORK.mkdir(parents=True, exist_ok=True)
    command = f"python bench/baselines.py --run {o.run} --n {o.n} --seed {o.seed} --steps {o.steps}"
    made_from = {
        "command": command,
        "adapter": zlib.crc32((run / "adapter.safetensors").read_bytes()),
    }
    old = read_json(file) if file.exists() else {}
    if old | made_from == old:
        done = old["methods"]
    for name, method in methods.items():
        pictures = WORK / (re.sub(r"[^a-z0-9.]+", "-", name.lower()) + ".npy")
        if name not in done or not pictures.exists():
            begun = time.time()
            output = method()
            done[name] = summary(judge_all(world, [kind] * o.n, [value] * o.n, output)) | {
                "seconds": round(time.time() - begun)
            }
            np.save(pictures, output[:12])
            file.write_text(json.dumps(made_from | {"methods": done}, indent=1) + "\n")
            print(
                f"{name}: success {100 * done[name]['success']:.1f} %, preservation {done[name]['preservation_db']} dB, "
                f"truth {done[name]['psnr_truth_db']:.1f} dB",
                flush=True,
            )
        rows.append(np.load(pictures))
    rows.append(np.stack([scenes.render(change(s, kind, value)) for s in world[:12]]))
    scenes.sheet([list(r) for r in rows]).save(RESULTS / "baselines.png")
    made = config.get("made", {"commit": "unknown", "machine": "unknown"})
    title = f"`{command} --pairs {' '.join(map(str, o.pairs))}`"
    (RESULTS / "baselines.md").write_text(
        page(
            done,
            f'{title}\n\n"{instr}", {o.n} held-out scenes, 95 % intervals over scenes. '
            "Picture: the source, a row for each method in this order, the truth.",
        )
        + f"\nByG's editor was made by commit {made['commit']}, {made['machine']}.\n"
    )
    print(json.dumps({k: done[k]["success"] for k in done}))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"baselines.py: {error}", file=sys.stderr)
        sys.exit(error.code)
