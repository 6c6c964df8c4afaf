"""What nobody has published: how true each routing's gradient is, and how true the teacher's cue.

    python bench/study.py --n 16 --seed 99 --runs bench/work/run-... out          # ten minutes on two cores

Routing: the gradient of the cycle alone with respect to the adapter, as each routing gives it, against the exact one (back-propagation
through the whole rollout): their cosine and the ratio of their lengths at every node t of the training grid, for an adapter before
training and for those of --runs; and what a step costs. The cue: |v_tgt - v_src| / |v_src| and the cosine of the wanted change with the
true one, x - y (the renderer's y), over t: asked at the source, where an edit begins, and at the true edit, where it should end.
"make it winter" on held-out scenes with full captions. Writes bench/results/study.md.
"""

import argparse
import contextlib
import json
import pathlib
import time

import numpy as np
import torch
from evaluate import held_out, read_json, scenes  # puts the repository on the path, so first
from memory import Meter

from data import derive  # isort: skip
from edits import change
from files.run import load_adapter, origin  # noqa: E402
from frozen.load import load_base  # noqa: E402
from frozen.vae import to_pixels
from losses import byg_loss, delta_change, fade, teacher
from model import merged, new_adapter
from routing import ROUTES, time_grid
from train import RECIPES

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def gradients(model, adapter, x, prompts, eps, k, ts, o, meter=contextlib.nullcontext):
    """-> {routing: (gradient of the cycle as one vector, seconds, meter)}; a meter slows it, so its seconds say nothing"""
    found = {}
    for routing in ROUTES:
        options = argparse.Namespace(
            **vars(o) | {"routing": routing, "prior": 0.0, "cycle": 1.0, "states": 1}
        )
        begun = time.time()
        with meter() as metered:
            loss, _ = byg_loss(
                model,
                merged(model, adapter),
                merged(model, adapter),
                x,
                prompts,
                eps,
                eps,
                torch.full((len(x),), k),
                ts,
                options,
            )
            grads = torch.autograd.grad(loss, list(adapter.values()), allow_unused=True)
        found[routing] = (
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(adapter.values(), grads)
                ]
            ),
            time.time() - begun,
            metered,
        )
    return found


def cues(model, x, y, prompts, eps, t, guidance):
    """Strength, and the cosines with x - y of the paper's change and of the delta cue's, at the source and at the true edit."""
    cos = lambda a: (
        torch.nn.functional.cosine_similarity(a.flatten(1), (x - y).flatten(1)).mean().item()
    )  # noqa: E731
    times, src, tgt, null = t.repeat(len(x)), *(prompts[p] for p in ("src", "tgt", "null"))
    x_t, row = torch.lerp(x, eps, t), []
    for state in (x_t, torch.lerp(y, eps, t)):
        v_src, v_tgt, v_there, v_guided = teacher(
            model,
            [
                ((state, times), src, None),
                ((state, times), tgt, None),
                ((x_t, times), src, None),
                ((state, times), tgt, fade(guidance, times)),
            ],
            null,
        )
        row += [
            ((v_tgt - v_src).flatten(1).norm(dim=1) / v_src.flatten(1).norm(dim=1)).mean().item()
        ] * (state is x_t)
        row += [cos(v_tgt - v_src), cos(delta_change(v_there, v_guided, x, x_t, state, times))]
    return row


def main():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--runs", nargs="*", default=[], help="trained editors of the embedded base")
    p.add_argument(
        "--n",
        type=int,
        default=16,
        help="scenes for the gradients; eight times as many for the cue",
    )
    p.add_argument("--seed", type=int, default=99)
    o = p.parse_args()
    recipe = argparse.Namespace(bootstrap=True, frames=1, **RECIPES["tiny"])
    model, vae, text, shift = load_base("tiny")
    world, rng, ts = (
        held_out("season", "winter", 8 * o.n, o.seed),
        np.random.default_rng(o.seed),
        time_grid(recipe.n, shift),
    )
    captions = [scenes.caption(s, rng, drop=0.0) for s in world]
    derived = [derive("make it winter", c) for c in captions]
    with torch.no_grad():
        x, y = (
            vae.encode(to_pixels(np.stack([scenes.render(s) for s in some])))
            for some in (world, [change(s, "season", "winter") for s in world])
        )
        prompts = {
            k: text(v)
            for k, v in (
                ("src", captions),
                ("tgt", [d[0] for d in derived]),
                ("undo", [d[1] for d in derived]),
                ("instr", ["make it winter"] * len(world)),
                ("null", [""] * len(world)),
            )
        }
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(o.seed))
    lines = [
        f"`python bench/study.py --n {o.n} --seed {o.seed} --runs {' '.join(o.runs)}`".replace(
            " --runs `", "`"
        ),
        "",
        f"Commit {origin()['commit']}, {time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads.",
        "",
        "## The cue",
        "",
        "| t | strength | cosine with the true change, at the source: paper | delta | at the true edit: paper | delta |",
        "|---|---|---|---|---|---|",
    ]
    with torch.no_grad():
        for t in ts[:-1]:
            lines.append(
                f"| {t:.3f} | "
                + " | ".join(
                    f"{v:.2f}" for v in cues(model, x, y, prompts, eps, t, recipe.guidance)
                )
                + " |"
            )
            print(lines[-1], flush=True)
    few, seconds = slice(o.n), {}
    for run in ["", *o.runs]:
        torch.manual_seed(o.seed)
        adapter = new_adapter(model, recipe.rank)
        if run:
            adapter = {
                k: v.requires_grad_()
                for k, v in load_adapter(pathlib.Path(run) / "adapter.safetensors", model)[
                    0
                ].items()
            }
        else:  # a zero adapter has no gradient in its A: a little off zero
            with torch.no_grad():
                [v.normal_(std=0.01) for k, v in adapter.items() if "lora_A" not in k]
        name = (
            f"After {read_json(pathlib.Path(run) / 'config.json')['steps']} steps ({run})"
            if run
            else "Before training"
        )
        lines += [
            "",
            f"## Routing: {name}",
            "",
            "Cosine with the exact gradient of the cycle (ratio of lengths). Last: of what goes through the "
            "forward edit alone, without the reverse edit's own gradient, which is the same.",
            "",
            "| t | straight-through | one-step | detach | straight-through, forward edit alone |",
            "|---|---|---|---|---|",
        ]
        for k, t in enumerate(ts[:-1]):
            found = gradients(
                model,
                adapter,
                x[few],
                {n: tuple(a[few] for a in p) for n, p in prompts.items()},
                eps[few],
                k,
                ts,
                recipe,
            )
            exact, own = found["backprop"][0], found["detach"][0]
            cell = lambda g, h: (
                f"{torch.nn.functional.cosine_similarity(g, h, dim=0):.2f} ({g.norm() / h.norm():.2f})"
            )  # noqa: E731
            lines.append(
                f"| {t:.3f} | "
                + " | ".join(
                    [cell(found[r][0], exact) for r in ("ste", "onestep", "detach")]
                    + [cell(found["ste"][0] - own, exact - own)]
                )
                + " |"
            )
            print(lines[-1], flush=True)
            seconds = {r: seconds.get(r, 0) + found[r][1] for r in ROUTES}
    metered = gradients(
        model,
        adapter,
        x[few],
        {n: tuple(a[few] for a in p) for n, p in prompts.items()},
        eps[few],
        0,
        ts,
        recipe,
        Meter,
    )
    peak = {r: metered[r][2].peak for r in ROUTES}
    lines += [
        "",
        "## What a cycle costs",
        "",
        f"Batch {o.n}, the rollout of {recipe.n} steps included; relative to detach.",
        "",
        "| | time | memory |",
        "|---|---|---|",
    ]
    lines += [
        f"| {r} | {seconds[r] / seconds['detach']:.2f} | {peak[r] / peak['detach']:.2f} |"
        for r in ROUTES
    ]
    (RESULTS / "study.md").write_text("\n".join(lines) + "\n")
    print(json.dumps({"seconds": seconds, "peak": peak}))


if __name__ == "__main__":
    main()
