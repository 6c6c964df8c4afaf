"""How good an editor is where the truth is known: edits of held-out scenes, judged by the renderer.

    python bench/evaluate.py --run out --n 200 --seed 1000
    python bench/evaluate.py --run out_clips --video --image out --n 40

success          of all 960 combinations of attributes, drawn for that very geometry, the nearest to
                 the output is the requested one
preservation_db  PSNR to the source over the pixels where source and truth agree; none for an edit
                 that leaves under 1 % of them as they were
psnr_truth_db    PSNR to the truth over all pixels

What an instruction leaves open is the editor's choice. Of rain and snow that begin to fall it is
where the drops are: the truth is the nearest of 256 places, a pixel apart, since with every second
pixel even true snow was misread at times. Of new trees it is where they stand: success asks that
the picture is nearer to one of 40 with the requested trees than to the source. More is open, which
`success` does ask and `success_free` does not: whether flakes fall where drops fell before, and
where the moon stands after sunset. Even true snow and true nights fail when these are elsewhere.

Intervals are 95 %, by bootstrap over scenes. Writes evaluate.json, .md and .png (source, edit,
truth of the first scenes and of the worst failures); the last line is one JSON object.

--video: success and preservation of every frame, and the temporal error: the root mean square, in
grey levels of 255, of the difference between the output's change from frame to frame and the
truth's. The truth is taken as the base's autoencoder shows it, which alone flickers by 4 levels:
`autoencoder`. Beside it that of the image editor, frame by frame.
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
import data  # noqa: E402
import scenes  # noqa: E402
from edits import EDITS, FALLING, NEVER, UNSEEN_STYLE, change, edit_prompts, propose  # noqa: E402
from files.clips import RATE  # noqa: E402
from files.disk import UserError, write  # noqa: E402
from files.run import find_run, load_adapter, origin, read_run  # noqa: E402
from frozen.load import edit_steps, load_base  # noqa: E402
from frozen.vae import to_images, to_pixels  # noqa: E402
from model import merged  # noqa: E402
from routing import noise, time_grid  # noqa: E402
from sample import edit  # noqa: E402

MAIN = ["season", "time", "weather", "house"]  # kinds of edits that count for the overall figures
FIGURES = ("success", "success_free", "preservation_db", "psnr_truth_db")


# ---- the scenes, and what is asked of them ------------------------------------------------------
def asked(instr):
    """What an instruction asks of the world: "make it winter" -> ("season", "winter")."""
    for kind, family in zip(scenes.ATTRIBUTES, data.FAMILIES):
        for value, (_, words) in family.items():
            if value in scenes.ATTRIBUTES[kind] and data.find_phrase(words, instr):
                return kind, value
    raise UserError(
        f"'{instr}' names no season, time, weather, house colour or style of the embedded world", 2
    )


def held_out(kind, value, n, seed):
    """n random scenes that are not yet as the edit wants them."""
    rng = np.random.default_rng((seed, 1))
    style = {} if value == "plain" else {"style": "plain"}
    world = []
    while len(world) < n:
        scene = scenes.sample_scene(rng, **style)
        if getattr(scene, kind) != value:
            world.append(scene)
    return world


def everything(n, seed):
    """The general editor's examination: n scenes for each kind of edit, asked for in wordings it
    was not trained on. -> {group: [(scene, kind, value, instruction)]}"""
    rng = np.random.default_rng((seed, 3))
    groups = {}
    for group in [*EDITS, "never asked for", "unseen style"]:
        cases = groups[group] = []
        while len(cases) < n:
            scene, kind, value = draw_case(group, rng)
            if value is not None and value != getattr(scene, kind):
                prompts = edit_prompts(scene, kind, value, rng, scenes.UNSEEN)
                cases.append((scene, kind, value, prompts["instr"]))
    return groups


def draw_case(group, rng):
    """-> scene, kind, value, which may be None, or what the scene has already"""
    style = UNSEEN_STYLE if group == "unseen style" else "plain"
    scene = scenes.sample_scene(rng, style=style)
    if group == "never asked for":
        kind = str(rng.choice(list(NEVER)))
        return scene, kind, NEVER[kind]
    kind = group if group in EDITS else str(rng.choice(MAIN))
    return scene, kind, propose(scene, kind, rng)


# ---- judging ------------------------------------------------------------------------------------
def distance(a, b):
    """Mean squared difference of two pictures (h, w, 3) uint8."""
    return float(((a.astype(np.float32) - b) ** 2).mean())


def psnr(a, b, mask=None):
    """In dB, over the pixels of the mask (h, w); None where that is under 1 % of them."""
    error = (a.astype(np.float32) - b) ** 2
    if mask is not None:
        if mask.mean() < 0.01:
            return None
        error = error[mask]
    return float(10 * np.log10(255**2 / max(error.mean(), 1e-2)))


def truths(scene, kind, value, output, tau):
    """What an edit should give: in the strict reading, and the nearest to the output where more is
    open. -> two pairs of a scene and the phase of its rain or snow, None: the scene's own"""
    wish = change(scene, kind, value)
    strict = wish, None
    options = [strict]
    if kind == "weather" and value in FALLING:
        options = [(wish, phase) for phase in itertools.product(range(16), repeat=2)]
    elif value == "night" and scene.time == "sunset":
        places = itertools.product(range(8, 57, 2), range(8, 16, 2))  # of the moon
        options = [(dataclasses.replace(wish, disc=place), None) for place in places]
    free = min(options, key=lambda truth: distance(output, scenes.render(truth[0], tau, truth[1])))
    if kind == "weather" and scene.weather not in FALLING:
        strict = free
    return strict, free


def misread(output, truth, tau):
    """The attributes that the renderer reads from an output, but not from the truth."""
    wish, phase = truth
    read = scenes.judge(wish, output[None], tau, phase)[0]
    return [k for k in scenes.ATTRIBUTES if read[k] != getattr(wish, k)]


def has_new_trees(scene, value, output, tau):
    """Whether the output is nearer to the scene with other trees than to the scene."""
    tries = 40 if value[0] else 1  # where they may stand
    drawn = [scenes.render(change(scene, "trees", value, i), tau) for i in range(tries)]
    before = distance(output, scenes.render(scene, tau))
    return min(distance(output, picture) for picture in drawn) < before


def measure(scene, kind, value, output, tau=0.0):
    """One edit against its exact truth at the time tau. -> dict of figures"""
    strict, free = truths(scene, kind, value, output, tau)
    wrong = misread(output, strict, tau)
    way = f"{getattr(scene, kind)} to {value}" if kind != "trees" else "trees"
    if kind == "trees" and not has_new_trees(scene, value, output, tau):
        wrong.append("trees")
    source = scenes.render(scene, tau)
    truth = scenes.render(strict[0], tau, strict[1])
    same = np.abs(source.astype(int) - truth).max(-1) <= 2  # (h, w)
    return {
        "success": not wrong,
        "success_free": not wrong or free != strict and not misread(output, free, tau),
        "wrong": wrong,
        "edit": way,
        "preservation_db": psnr(output, source, same),
        "psnr_truth_db": psnr(output, truth),
    }


def judge_all(world, kinds, values, output, taus=None):
    """`measure` of an edit of each scene, on two cores. -> list of dicts"""
    taus = taus or itertools.repeat(0.0)
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        return list(pool.map(measure, world, kinds, values, output, taus, chunksize=4))


def interval(values, times=2000):
    """95 % bootstrap interval of the mean over scenes."""
    values = np.asarray(values, np.float64)
    drawn = np.random.default_rng(0).integers(len(values), size=(times, len(values)))
    means = values[drawn].mean(1)
    return [round(float(q), 4) for q in np.percentile(means, (2.5, 97.5))]


def summary(results):
    """-> means over the scenes that have the figure, None without any, and their intervals; what
    was misread; under "failed" of each edit [failures, cases]"""
    means, intervals = {}, {}
    for name in FIGURES:
        values = [r[name] for r in results if r[name] is not None]
        means[name] = round(float(np.mean(values)), 4) if values else None
        intervals[name] = interval(values) if values else None
    cases = collections.Counter(r["edit"] for r in results)
    failures = collections.Counter(r["edit"] for r in results if not r["success"])
    return means | {
        "interval": intervals,
        "n": len(results),
        "wrong": dict(collections.Counter(k for r in results for k in r["wrong"])),
        "failed": {way: [n, cases[way]] for way, n in failures.most_common()},
    }


# ---- editing ------------------------------------------------------------------------------------
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
    """Edits images (n, h, w, 3), of which every `frames` are a clip, some at a time.

    prompts: (context, pooled) of n, or of 1 for all; steps: None for the editor's usual; shared:
    one noise for all frames of a clip; together: a clip is edited as one, not frame by frame; null:
    the prompt of no words, for guidance. -> (n, h, w, 3) uint8"""
    adapter = merged(model, adapter)
    ts = time_grid(steps or edit_steps(model), shift)
    generator = torch.Generator().manual_seed(seed)
    some = 25 if frames == 1 else max(1, 24 // frames) * frames  # whole clips
    alike = frames if shared else 1
    edited = []
    for i in range(0, len(images), some):
        x = vae.encode(to_pixels(np.stack(images[i : i + some])))
        eps = noise(len(x) // alike, alike, x.shape[1:], generator)
        prompt = [a[i : i + some] if len(a) > 1 else of_each(a, x) for a in prompts]
        words = (prompt, eps, ts, frames if together else 1, null, guidance)
        edited.append(to_images(vae.decode(edit(model, adapter, x, *words))))
    return np.concatenate(edited)


def of_each(text, x):
    """One text's tensor (1, ...) -> (B, ...), for every sample of x the same."""
    return text.expand(len(x), *text.shape[1:])


# ---- an editor of clips -------------------------------------------------------------------------
def temporal_error(output, truth):
    """output, truth (clips, frames, h, w, 3) -> for each clip, the root mean square of what their
    changes between frames differ by (clips,)"""
    changes = [np.diff(a.astype(np.float32), axis=1) for a in (output, truth)]
    return np.sqrt(((changes[0] - changes[1]) ** 2).mean((1, 2, 3, 4)))


def errors(name, world, output, truth):
    """output, truth (clips * frames, h, w, 3) -> the temporal error's mean over the clips, and over
    those of each weather: of what falls, most changes from frame to frame"""
    output, truth = (np.stack(a).reshape(len(world), -1, *a[0].shape) for a in (output, truth))
    each = temporal_error(output, truth)
    weather = np.array([s.weather for s in world])
    by = {w: round(float(each[weather == w].mean()), 2) for w in sorted(set(weather))}
    return {name: round(float(each.mean()), 4), f"{name}_by_weather": by}


def video(o, config, run, out):
    """The examination of an editor of clips, beside the image editor frame by frame. -> figures"""
    instr = o.instr or config["instr"]
    kind, value = asked(instr)
    frames = config["frames"]
    times = [i / RATE for i in range(frames)]
    world = held_out(kind, value, o.n, o.seed)
    images = [scenes.render(s, t) for s in world for t in times]
    truth = [scenes.render(change(s, kind, value), t) for s in world for t in times]
    model, vae, text, shift = load_base(config["base"])
    with torch.no_grad():
        prompt = text([instr])
        shown = to_images(vae.decode(vae.encode(to_pixels(np.stack(truth)))))

    def edited(folder, shared, together):
        adapter = load_adapter(pathlib.Path(folder) / "adapter.safetensors", model)
        how = (prompt, config.get("shift") or shift, o.steps, o.seed, frames, shared, together)
        return edit_all(model, vae, adapter, images, *how)

    def judge(output):
        each = zip(*[(s, kind, value) for s in world for _ in times])
        return summary(judge_all(*each, output, times * o.n))

    output = edited(run, True, True)
    figures = judge(output)
    figures |= errors("temporal_error", world, output, shown)
    figures |= errors("autoencoder", world, shown, truth)
    figures |= {"frames": frames, "clips": o.n, "seed": o.seed}
    rows = [images, output]
    if o.image:  # all frames of a clip as pictures, each under its own noise, or all under one
        for name, shared in (("per_frame", False), ("shared_noise", True)):
            alone = edited(o.image, shared, False)
            figures |= errors(f"temporal_error_{name}", world, alone, shown) | {name: judge(alone)}
            rows.append(alone)
    rows.append(truth)
    clips = [slice(i * frames, (i + 1) * frames) for i in range(min(3, o.n))]
    scenes.sheet([row[clip] for clip in clips for row in rows]).save(out / "video.png")
    write(out / "video.json", json.dumps(figures, indent=1) + "\n")
    return figures


# ---- what is written ----------------------------------------------------------------------------
def in_db(group, name):
    """A figure with its interval, for the table."""
    if group[name] is None:
        return "none stays"
    low, high = group["interval"][name]
    return f"{group[name]:.1f} dB ({low:.1f} to {high:.1f})"


def page(groups, title):
    """The figures as Markdown, a line for each group. groups: {name: its `summary`}"""
    heads = ["edits", "success", "preservation", "truth", "n", "misclassified", "fails most"]
    free = any(g["success_free"] != g["success"] for g in groups.values())
    if free:
        heads.insert(2, "what is open, free")
    lines = [title, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, g in groups.items():
        low, high = (100 * v for v in g["interval"]["success"])
        cells = [name, f"{100 * g['success']:.1f} % ({low:.1f} to {high:.1f})"]
        if free:
            cells.append(f"{100 * g['success_free']:.1f} %")
        cells += [in_db(g, "preservation_db"), in_db(g, "psnr_truth_db"), str(g["n"])]
        wrong = sorted(g["wrong"].items(), key=lambda item: -item[1])
        cells.append(", ".join(f"{kind} {n}" for kind, n in wrong) or "nothing")
        fails = list(g["failed"].items())[:3]
        cells.append(", ".join(f"{way} ({n} of {cases})" for way, (n, cases) in fails))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def choose_shown(results, groups, n):
    """Of each group's n results the first, then the worst failures. -> list of indices"""
    few = 8 if groups == 1 else 4
    shown = []
    for i in range(groups):
        mine = range(i * n, (i + 1) * n)
        failures = [j for j in mine if not results[j]["success"]]
        failures.sort(key=lambda j: results[j]["psnr_truth_db"])
        shown += [*mine[:few], *failures[:few]]
    return shown


def command_line(o):
    """The command that makes this page again."""
    line = f"python bench/evaluate.py --run {o.run} --n {o.n} --seed {o.seed}"
    if o.instr:
        line += f' --instr "{o.instr}"'
    if o.steps is not None:
        line += f" --steps {o.steps}"
    if o.guidance != 1:
        line += f" --guidance {o.guidance:g}"
    if o.out:
        line += f" --out {o.out}"
    return line


def pictures(o, config, run, out):
    """The examination of an editor of pictures. -> figures"""
    groups = {}
    if instr := o.instr or config["instr"]:
        kind, value = asked(instr)
        groups[kind] = [(s, kind, value, instr) for s in held_out(kind, value, o.n, o.seed)]
    else:
        groups = everything(o.n, o.seed)
    cases = [case for group in groups.values() for case in group]
    world, kinds, values, asks = zip(*cases)
    images = [scenes.render(s) for s in world]
    model, vae, text, shift = load_base(config["base"])
    adapter = load_adapter(run / "adapter.safetensors", model)
    with torch.no_grad():
        prompts, null = text(list(asks)), text([""])
    how = (prompts, config.get("shift") or shift, o.steps, o.seed)
    output = edit_all(model, vae, adapter, images, *how, null=null, guidance=o.guidance)
    results = judge_all(world, kinds, values, output)

    figures, counted = {}, []
    for i, name in enumerate(groups):
        some = results[i * o.n : (i + 1) * o.n]
        figures[name] = summary(some)
        if name in MAIN or len(groups) == 1:
            counted += some
    overall = summary(counted)

    shown = choose_shown(results, len(groups), o.n)
    truth = [scenes.render(change(*cases[j][:3])) for j in shown]
    rows = [[images[j] for j in shown], [output[j] for j in shown], truth]
    strips = [row[k : k + 16] for k in range(0, len(shown), 16) for row in rows]
    scenes.sheet(strips).save(out / "evaluate.png")
    lines = dict(figures)
    if len(groups) > 1:
        lines["season, time, weather, house"] = overall
    made = origin()
    by = f"Made by commit {made['commit']} on {time.strftime('%Y-%m-%d')}, {made['machine']}."
    table = page(lines, f"`{command_line(o)}`") + f"\n{by}\n"
    write(out / "evaluate.md", table)
    what = "source, edit, truth; first scenes, then the worst failures"
    print(f"{table}picture: {out / 'evaluate.png'} ({what})")
    line = overall | {"seed": o.seed, "kinds": figures}
    write(out / "evaluate.json", json.dumps(line, indent=1) + "\n")
    return line


def options():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--run", default="out", help="folder that train.py wrote (out)")
    whole = "the run's own; without one the general editor's whole examination"
    p.add_argument("--instr", help=f"the edit ({whole})")
    p.add_argument("--n", type=int, default=200, help="scenes, of each kind of edit (200)")
    p.add_argument("--seed", type=int, default=1000, help="of the scenes and of the noise (1000)")
    p.add_argument("--steps", type=int, help="Euler steps of the edit (as in sample.py)")
    p.add_argument("--guidance", type=float, default=1.0, help="of the edit; 1 is none (1)")
    p.add_argument("--video", action="store_true", help="of an editor of clips: writes video.*")
    p.add_argument("--image", help="with --video: an editor of pictures, to compare with")
    p.add_argument("--out", help="folder for what is written (the run)")
    o = p.parse_args()
    if o.video and o.guidance != 1:
        p.error("--guidance does not go with --video")
    return o


def main():
    o = options()
    run = find_run(o.run)
    config = read_run(run)
    out = pathlib.Path(o.out or o.run)
    out.mkdir(parents=True, exist_ok=True)
    examine = video if o.video else pictures
    print(json.dumps(examine(o, config, run, out)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(error.code)
