"""The README's title picture: held-out scenes under three instructions, and one edit undone.

    python bench/picture.py out_winter out_sunset out_blue        # a few seconds; tiny/title.png

Rows are scenes of the embedded world that no training saw, drawn from --seed: two in clear weather,
one in the rain. Columns: the source, the edit of each run, and the first run's edit undone.
"""

import argparse
import pathlib

import numpy as np
import torch
from evaluate import ROOT, edit_all, scenes  # puts the repository on the path, so first
from PIL import Image, ImageDraw, ImageFont

from data import derive
from files.pictures import write_image
from files.run import load_adapter, read_run
from frozen.load import load_base

SIDE = 160  # pixels of a scene, which has 64
GAP = 6
HEAD = 24  # pixels of the line of headings
ROWS = (
    {"time": "day", "weather": "clear", "kind": "pine"},
    {"time": "day", "weather": "clear", "kind": "round"},
    {"time": "day", "weather": "rain", "kind": "poplar"},
)


def pick(rng: np.random.Generator) -> list:
    """A scene for each of ROWS: in summer, with trees and a house that is not blue."""
    found = []
    for wish in ROWS:
        while True:
            scene = scenes.sample_scene(rng, style="plain", season="summer")
            fits = all(getattr(scene, name) == value for name, value in wish.items())
            if fits and scene.trees and scene.house not in ("blue", "white"):
                break
        found.append(scene)
    return found


def headed(columns: dict[str, list[np.ndarray]], side: int) -> Image.Image:
    """columns: heading -> pictures (h, w, 3) uint8, a row each, drawn side x side -> the sheet"""
    rows = len(next(iter(columns.values())))
    page = Image.new("RGB", (len(columns) * (side + GAP), HEAD + rows * (side + GAP)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for i, (heading, pictures) in enumerate(columns.items()):
        left = i * (side + GAP)
        draw.text((left + side // 2, HEAD // 2), heading, "black", font, anchor="mm")
        for j, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
            page.paste(tile, (left, HEAD + j * (side + GAP)))
    return page


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="+", help="folders of runs of one instruction each")
    p.add_argument("--seed", type=int, default=0, help="of the scenes and the noise")
    p.add_argument("--out", default=ROOT / "tiny" / "title.png")
    o = p.parse_args()
    model, vae, text, shift = load_base("tiny")
    rng = np.random.default_rng(o.seed)
    world = pick(rng)
    sources = np.stack([scenes.render(scene) for scene in world])
    captions = [scenes.caption(scene, rng, drop=0.0) for scene in world]

    def edit(run, pictures, words):
        adapter = load_adapter(run / "adapter.safetensors", model)
        with torch.no_grad():
            prompt = text(words)
        return edit_all(model, vae, adapter, list(pictures), prompt, shift, None, o.seed)

    columns = {"source": sources}
    runs = [pathlib.Path(run) for run in o.runs]
    for run in runs:
        instr = read_run(run)["instr"]
        columns[f'"{instr}"'] = edit(run, sources, [instr] * len(world))
    first = read_run(runs[0])["instr"]
    undo = [derive(first, caption)[1] for caption in captions]
    columns[f"{first.split()[-1]} undone"] = edit(runs[0], columns[f'"{first}"'], undo)
    write_image(o.out, headed(columns, SIDE))
    print(o.out)


if __name__ == "__main__":
    main()
