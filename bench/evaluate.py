"""Quality of an editor where the truth is known: held-out scenes of the embedded world, edited, judged by the renderer.

    python bench/evaluate.py --run out --n 200 --seed 1000
    python bench/evaluate.py --run out_video --video --image out --n 40

success         of all 960 attribute combinations drawn for that very geometry, the nearest to the output is the wished-for one
preservation_db PSNR to the source over the pixels where source and truth agree; none for an edit that leaves under 1 % of them as they were
psnr_truth_db   PSNR to the truth over all pixels
What an instruction leaves open is the editor's choice (the general editor's examination only): of rain and snow that begin to fall,
where the drops are (the truth is the nearest of 256 places, a pixel apart: with every second pixel even true snow was not always read as
snow); of new trees, where they stand (success asks besides that the picture is nearer to one of 40 with the wished trees than to the
source). More is open, which `success` does ask and `success_free` does not: whether flakes fall where drops fell before, and where the moon
stands after sunset, since even true snow and true nights fail when these are elsewhere.
Intervals are 95 %, by bootstrap over scenes. Writes evaluate.json, .md and .png (source, edit, truth of the first scenes and of the worst
failures); the last line is one JSON object.
--video: success and preservation of every frame, and the temporal error, which is the root mean square, in grey levels of 255, of the
difference between the output's change from frame to frame and the truth's, the truth as the base's autoencoder shows it (which alone
flickers by 4 levels: `autoencoder`); beside it that of the image editor, frame by frame.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import json
import pathlib
import sys
import time

import numpy as np
import torch


ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]
from files.disk import UserError, read_json  # noqa: E402
from files.run import load_adapter, origin  # noqa: E402
from frozen.load import edit_steps, load_base  # noqa: E402
import data  # noqa: E402
import scenes  # noqa: E402
from edits import EDITS, FALLING, NEVER, UNSEEN_STYLE, change, edit_prompts, propose  # noqa: E402
from frozen.vae import to_images, to_pixels  # noqa: E402
from model import merged  # noqa: E402
from routing import noise, time_grid  # noqa: E402
from sample import edit  # noqa: E402

MAIN = ["season", "time", "weather", "house"]


def asked(instr):
    """What an instruction asks of the world: "make it winter" -> ("season", "winter")."""
    for kind, family in zip(scenes.ATTRIBUTES, data.FAMILIES):
        for value, (_, words) in family.items():
            if value in scenes.ATTRIBUTES[kind] and data.find_phrase(words, instr):
                return kind, value
    raise UserError(
        f"'{instr}' names no season, time, weather, house colour or style of the embedded world", 2
    )


def psnr(a, b, mask=None):
    error = (a.astype(np.float32) - b) ** 2
    if mask is not None and mask.mean() < 0.01:
        return None
    return float(10 * np.log10(255**2 / max(error[... if mask is None else mask].mean(), 1e-2)))


def measure(scene, kind, value, output, tau=0.0):
    """One edit against its exact truth at the time tau. -> dict; success_free: with flakes after rain and the moon after sunset anywhere"""
    wish = change(scene, kind, value)
    distance = lambda picture: float(((output.astype(np.float32) - picture) ** 2).mean())  # noqa: E731
    nearest = lambda options: min(options, key=lambda o: distance(scenes.render(o[0], tau, o[1])))  # noqa: E731
    true = anywhere = (wish, None)  # scene, where rain or snow begins
    if kind == "weather" and value in FALLING:
        anywhere = nearest((wish, phase) for phase in itertools.product(range(16), repeat=2))
        true = true if scene.weather in FALLING else anywhere
    elif value == "night" and scene.time == "sunset":
        anywhere = nearest(
            (dataclasses.replace(wish, disc=place), None)
            for place in itertools.product(range(8, 57, 2), range(8, 16, 2))
        )

    def misread(wish, falls):
        read = scenes.judge(wish, output[None], tau, falls)[0]
        return [k for k in scenes.ATTRIBUTES if read[k] != getattr(wish, k)]

    source, truth, wrong = (
        scenes.render(scene, tau),
        scenes.render(true[0], tau, true[1]),
        misread(*true),
    )
    if kind == "trees":
        others = [
            scenes.render(change(scene, kind, value, i), tau) for i in range(40 if value[0] else 1)
        ]
        wrong += ["trees"] * (min(map(distance, others)) >= distance(source))
    free = not wrong or anywhere != true and not misread(*anywhere)
    same = np.abs(source.astype(int) - truth).max(-1) <= 2
    way = "trees" if kind == "trees" else f"{getattr(scene, kind)} to {value}"
    return {
        "success": not wrong,
        "success_free": free,
        "wrong": wrong,
        "edit": way,
        "preservation_db": psnr(output, source, same),
        "psnr_truth_db": psnr(output, truth),
    }


def held_out(kind, value, n, seed):
    """n random scenes that are not yet as the edit wants them."""
    rng, world = np.random.default_rng((seed, 1)), []
    while len(world) < n:
        scene = scenes.sample_scene(rng, **{} if value == "plain" else {"style": "plain"})
        if getattr(scene, kind) != value:
            world.append(scene)
    return world


def everything(n, seed):
    """The general editor's examination: n scenes for each kind of edit, asked for in wordings it was not trained on."""
    rng, groups = np.random.default_rng((seed, 3)), {}
    for group in [*EDITS, "never asked for", "unseen style"]:
        cases = groups[group] = []
        while len(cases) < n:
            scene = scenes.sample_scene(
                rng, style=UNSEEN_STYLE if group == "unseen style" else "plain"
            )
            kind = (
                group
                if group in EDITS
                else str(rng.choice(list(NEVER) if group == "never asked for" else MAIN))
            )
            value = NEVER[kind] if group == "never asked for" else propose(scene, kind, rng)
            if value is not None and value != getattr(scene, kind):
                cases.append(
                    (
                        scene,
                        kind,
                        value,
                        edit_prompts(scene, kind, value, rng, scenes.UNSEEN)["instr"],
                    )
                )
    return groups


def interval(values, times=2000):
    """95 % bootstrap interval of the mean over scenes."""
    values = np.asarray(values, np.float64)
    draws = values[np.random.default_rng(0).integers(len(values), size=(times, len(values)))].mean(
        1
    )
    return [round(float(q), 4) for q in np.percentile(draws, (2.5, 97.5))]


FIGURES = ("success", "success_free", "preservation_db", "psnr_truth_db")


def summary(results):
    """-> means over scenes (of those that have the figure; None without), and under `interval` their 95 % intervals"""
    values = {k: [r[k] for r in results if r[k] is not None] for k in FIGURES}
    return {k: round(float(np.mean(v)), 4) if v else None for k, v in values.items()} | {
        "interval": {k: interval(v) if v else None for k, v in values.items()},
        "n": len(results),
        "wrong": dict(collections.Counter(k for r in results for k in r["wrong"])),
        "failed": {
            e: [n, sum(r["edit"] == e for r in results)]
            for e, n in collections.Counter(
                r["edit"] for r in results if not r["success"]
            ).most_common()
        },
    }  # [failures, cases]


def judge_all(world, kinds, values, output, taus=None):
    """One edit each. -> results per scene"""
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        return list(
            pool.map(
                measure, world, kinds, values, output, taus or itertools.repeat(0.0), chunksize=4
            )
        )


@torch.no_grad()
def edit_all(
    model,
    vae,
    adapter,
    images,
    prompts,
    shift,
    steps,
    seed,
    frames=1,
    shared=True,
    together=True,
    null=None,
    guidance=1.0,
):
    """images (n, h, w, 3), `frames` for a clip, and prompts: (context, pooled) of n, or of 1 for all; null: of no words, for guidance
    -> edited images; together: the frames of a clip as a clip, not each as a picture"""
    adapter, ts = merged(model, adapter), time_grid(steps or edit_steps(model), shift)
    out, generator, size = (
        [],
        torch.Generator().manual_seed(seed),
        max(1, 24 // frames) * frames if frames > 1 else 25,
    )
    for i in range(0, len(images), size):
        x = vae.encode(to_pixels(np.stack(images[i : i + size])))
        alike = frames if shared else 1  # frames under one noise
        eps = noise(len(x) // alike, alike, x.shape[1:], generator)
        p = tuple(
            a[i : i + size] if len(a) > 1 else a.expand(len(x), *a.shape[1:]) for a in prompts
        )
        out.append(
            to_images(
                vae.decode(
                    edit(model, adapter, x, p, eps, ts, frames if together else 1, null, guidance)
                )
            )
        )
    return np.concatenate(out)


def page(groups, title):
    """The figures as Markdown."""
    free = any(g["success_free"] != g["success"] for g in groups.values())
    lines = [
        title,
        "",
        "| edits | success |"
        + " what is open, free |" * free
        + " preservation | truth | n | read wrongly | fails most |",
        "|---|---|" + "---|" * free + "---|---|---|---|---|",
    ]
    for name, g in groups.items():
        low, high = (100 * v for v in g["interval"]["success"])
        db = [
            f"{g[k]:.1f} dB ({g['interval'][k][0]:.1f} to {g['interval'][k][1]:.1f})"
            if g[k] is not None
            else "none stays"
            for k in FIGURES[2:]
        ]
        wrong = (
            ", ".join(f"{k} {v}" for k, v in sorted(g["wrong"].items(), key=lambda w: -w[1]))
            or "nothing"
        )
        fails = ", ".join(
            f"{e} ({n} of {of})" for e, (n, of) in list(g.get("failed", {}).items())[:3]
        )
        lines.append(
            f"| {name} | {100 * g['success']:.1f} % ({low:.1f} to {high:.1f}) |"
            + f" {100 * g['success_free']:.1f} % |" * free
            + f" {db[0]} | {db[1]} | {g['n']} | {wrong} | {fails} |"
        )
    return "\n".join(lines) + "\n"


def temporal_error(output, truth):
    """output, truth (clips, frames, h, w, 3) -> for each clip, the root mean square of what their changes between frames differ by"""
    difference = np.diff(output.astype(np.float32), axis=1) - np.diff(
        truth.astype(np.float32), axis=1
    )
    return np.sqrt((difference**2).mean((1, 2, 3, 4)))


def video(o, config, run, out):
    """The examination of an editor of clips, beside the image editor frame by frame. -> figures"""
    kind, value = asked(o.instr or config["instr"])
    world, frames = held_out(kind, value, o.n, o.seed), config["frames"]
    times = [i / 8 * config["stride"] for i in range(frames)]
    images, truth = (
        [scenes.render(s, t) for s in some for t in times]
        for some in (world, [change(s, kind, value) for s in world])
    )
    model, vae, text, shift = load_base(config["base"])
    with torch.no_grad():
        shown = to_images(vae.decode(vae.encode(to_pixels(np.stack(truth)))))
    clips = lambda a: np.stack(a).reshape(o.n, frames, *a[0].shape)  # noqa: E731
    weather = np.array(
        [s.weather for s in world]
    )  # of what falls, most changes from frame to frame

    def errors(name, a, b=shown):
        """-> mean over the clips, and over those of each weather"""
        each = temporal_error(clips(a), clips(b))
        by = {w: round(float(each[weather == w].mean()), 2) for w in sorted(set(weather))}
        return {name: round(float(each.mean()), 4), f"{name}_by_weather": by}

    def edited(folder, shared, together):
        adapter = load_adapter(pathlib.Path(folder) / "adapter.safetensors", model)
        with torch.no_grad():
            return edit_all(
                model,
                vae,
                adapter,
                images,
                text([o.instr or config["instr"]]),
                shift,
                o.steps,
                o.seed,
                frames,
                shared,
                together,
            )

    output = edited(run, True, True)
    judge = lambda a: summary(
        judge_all(*zip(*[(s, kind, value) for s in world for _ in times]), a, times * o.n)
    )  # noqa: E731
    figures = judge(output) | errors("temporal_error", output) | errors("autoencoder", shown, truth)
    figures |= {"frames": frames, "clips": o.n, "seed": o.seed}
    rows = [images, output]
    if (
        o.image
    ):  # frame by frame: all frames of a clip as pictures, with noise of their own or one for all
        for name, shared in (("per_frame", False), ("shared_noise", True)):
            alone = edited(o.image, shared, False)
            figures |= errors(f"temporal_error_{name}", alone) | {name: judge(alone)}
            rows.append(alone)
    scenes.sheet(
        [row[i * frames : (i + 1) * frames] for i in range(3) for row in [*rows, truth]]
    ).save(out / "video.png")
    (out / "video.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def main():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--run", default="out")
    p.add_argument(
        "--instr",
        help="default: the run's own; without one of either, the general editor's whole examination",
    )
    p.add_argument("--n", type=int, default=200, help="scenes (of each kind of edit)")
    p.add_argument("--seed", type=int, default=1000, help="of the scenes and of the noise")
    p.add_argument("--steps", type=int, help="Euler steps of the edit (default: as in sample.py)")
    p.add_argument(
        "--guidance", type=float, help="of the edit, not with --video (default: as in sample.py)"
    )
    p.add_argument(
        "--video",
        action="store_true",
        help="the run is an editor of clips: writes video.json and video.png",
    )
    p.add_argument(
        "--image", help="with --video: the run of an image editor to compare with, frame by frame"
    )
    p.add_argument("--out", help="folder for evaluate.json, .md and .png (default: the run)")
    o = p.parse_args()
    run = pathlib.Path(o.run)
    if not (run / "adapter.safetensors").exists():
        raise UserError(f"{run} holds no trained adapter; train one with train.py first", 2)
    config, out = read_json(run / "config.json"), pathlib.Path(o.out or o.run)
    out.mkdir(parents=True, exist_ok=True)
    if o.video:
        return print(json.dumps(video(o, config, run, out)))
    if instr := o.instr or config.get("instr"):
        kind, value = asked(instr)
        groups = {kind: [(s, kind, value, instr) for s in held_out(kind, value, o.n, o.seed)]}
    else:
        groups = everything(o.n, o.seed)
    model, vae, text, shift = load_base(config["base"])
    adapter = load_adapter(run / "adapter.safetensors", model)
    world, kinds, values, asks = (
        list(a) for a in zip(*(c for cases in groups.values() for c in cases))
    )
    images = [scenes.render(s) for s in world]
    with torch.no_grad():
        output = edit_all(
            model,
            vae,
            adapter,
            images,
            text(asks),
            shift,
            o.steps,
            o.seed,
            null=text([""]),
            guidance=1.0 if o.guidance is None else o.guidance,
        )
    results = judge_all(world, kinds, values, output)
    figures = {name: summary(results[i * o.n : (i + 1) * o.n]) for i, name in enumerate(groups)}
    overall = summary(
        [
            r
            for i, name in enumerate(groups)
            if name in MAIN or len(groups) == 1
            for r in results[i * o.n : (i + 1) * o.n]
        ]
    )
    shown = []  # of each kind the first scenes, then the worst failures
    for i in range(len(groups)):
        mine, few = range(i * o.n, (i + 1) * o.n), 8 if len(groups) == 1 else 4
        worst = sorted(
            (j for j in mine if not results[j]["success"]),
            key=lambda j: results[j]["psnr_truth_db"],
        )
        shown += [*mine[:few], *worst[:few]]
    truth = [scenes.render(change(world[j], kinds[j], values[j])) for j in shown]
    rows = [[a[j] for j in shown] for a in (images, output)] + [truth]
    scenes.sheet([row[k : k + 16] for k in range(0, len(shown), 16) for row in rows]).save(
        out / "evaluate.png"
    )
    command = (
        f"python bench/evaluate.py --run {o.run} --n {o.n} --seed {o.seed}"
        + f' --instr "{o.instr}"' * bool(o.instr)
        + f" --steps {o.steps}" * (o.steps is not None)
        + f" --guidance {o.guidance}" * (o.guidance is not None)
        + f" --out {o.out}" * bool(o.out)
    )
    made = origin()
    table = (
        page(
            figures | ({"season, time, weather, house": overall} if len(groups) > 1 else {}),
            f"`{command}`",
        )
        + f"\nMade by commit {made['commit']} on {time.strftime('%Y-%m-%d')}, {made['machine']}.\n"
    )
    (out / "evaluate.md").write_text(table)
    print(
        f"{table}picture: {out / 'evaluate.png'} (source, edit, truth; first scenes, then the worst failures)"
    )
    line = overall | {"seed": o.seed, "kinds": figures}
    (out / "evaluate.json").write_text(json.dumps(line, indent=1) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(error.code)
