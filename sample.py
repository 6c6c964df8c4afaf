"""Edits pictures with a trained adapter, or draws from a base.

    python sample.py                                                        # held-back images of the last run, or a first look
    python sample.py --input photo.jpg --instr "make it winter" --output x.png
    python sample.py --input folder/ --output edited/
    python sample.py --base tiny --prompt "a red house in winter" --output house.png
"""
import argparse
import math
import pathlib
import sys

import numpy as np
import torch
from PIL import Image

import data
from frozen.vae import to_images, to_pixels
from model import ROOT, UserError, choose_base, load_adapter, load_base, merged, read_json
from routing import integrate, time_grid


def edit(model, adapter, x, prompt, eps, ts):
    """The edit: the editor's rollout from eps, exactly as in training. x (B, C, H, W) source -> (B, C, H, W)"""
    adapter = merged(model, adapter)
    *_, y = integrate(lambda y, t: model(y, t, prompt, x, adapter), eps, ts)
    return y


def guided(model, prompt, null, guidance):
    """The base's velocity with classifier-free guidance. prompt, null: (context, pooled) -> velocity(y, t)"""
    both = tuple(torch.cat(pair) for pair in zip(null, prompt))

    def velocity(y, t):
        v0, v1 = model(y.repeat(2, 1, 1, 1), t.repeat(2), both).float().chunk(2)
        return v0 + guidance * (v1 - v0)
    return velocity


def generate(model, prompt, null, eps, ts, guidance):
    """Text to image with the base alone. -> (B, C, H, W)"""
    *_, x = integrate(guided(model, prompt, null, guidance), eps, ts)
    return x


def contact_sheet(columns, gap=4):
    """columns: lists of (h, w, 3) uint8, e.g. sources, edits, edits undone -> one picture, a row for each source."""
    rows = [np.concatenate([np.pad(p, ((gap, gap), (gap, gap), (0, 0)), constant_values=255) for p in row], 1) for row in zip(*columns)]
    page = Image.fromarray(np.concatenate(rows, 0))
    zoom = max(1, 512 // page.width)
    return page.resize((page.width * zoom, page.height * zoom), Image.Resampling.NEAREST)


def working_size(h, w, model, vae, limit):
    """The size an h x w picture is edited at: its aspect, about limit x limit pixels, whole patches of the base."""
    unit = model.patch * vae.factor
    scale = limit / (h * w) ** .5
    return tuple(min(max(unit, round(s * scale / unit) * unit), model.grid * unit) for s in (h, w))


def read_run(folder):
    """config.json of a run. -> dict with base, instr (None: many), size [h, w] and held, the pictures kept back (paths from the run)"""
    config, words = read_json(folder / "config.json"), ("path", "instr", "undo")
    size, held = config.get("size"), config.get("held")
    if not (isinstance(config.get("base"), str) and isinstance(config.get("instr", 0), (str, type(None)))
            and isinstance(size, list) and len(size) == 2 and all(isinstance(s, int) and 8 <= s <= 8192 for s in size)
            and isinstance(held, list) and held and all(isinstance(h, dict) and all(isinstance(h.get(w), str) for w in words) for h in held)):
        raise UserError(f"{folder / 'config.json'}: is not as train.py writes it (damaged, or of an older nanoByG); train again")
    return config


def options():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--run", help="folder that train.py wrote (default: out; before that is there tiny/editor, which came with the repository)")
    p.add_argument("--input", help="image or folder (default: the run's held-back images)")
    p.add_argument("--output", help="file, or folder for a folder (default: edited.png, or edited/)")
    p.add_argument("--instr", help="the edit (default: the run's own)")
    p.add_argument("--prompt", help="draw this with the base alone, no editing")
    p.add_argument("--base", help="base to use (default: the run's own)")
    p.add_argument("--steps", type=int, default=20, help="Euler steps (28 is usual with --prompt)")
    p.add_argument("--guidance", type=float, default=4.5, help="with --prompt only; the editor needs none")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args()


@torch.no_grad()
def main():
    o = options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    noise, autocast = torch.Generator().manual_seed(o.seed), torch.autocast(device.type, dtype, enabled=device.type == "cuda")
    if o.prompt is not None:
        model, vae, text, shift = load_base(choose_base(o.base or "auto"), device, dtype)
        eps = torch.randn(1, model.channels, model.sample_size, model.sample_size, generator=noise).to(device)
        with autocast:
            x = generate(model, text([o.prompt]), text([""]), eps, time_grid(o.steps, shift), o.guidance)
        data.write_image(o.output or "drawn.png", to_images(vae.decode(x))[0])
        return print(f"drawn: {o.output or 'drawn.png'}")
    run = pathlib.Path(o.run or "out")
    if not o.run and not run.exists():
        run = ROOT / "tiny" / "editor"
        print("note: nothing is trained yet, so this is tiny/editor, which came with the repository", file=sys.stderr)
    if not (run / "adapter.safetensors").exists():
        raise UserError(f"{run} holds no trained adapter: train one first (python train.py --data tiny/examples "
                        '--instr "make it winter"), or name its folder with --run', 2)
    config = read_run(run)
    if o.input and not pathlib.Path(o.input).exists():
        raise UserError(f"--input {o.input}: there is no such file or folder", 2)
    model, vae, text, shift = load_base(choose_base(o.base or config["base"]), device, dtype)
    adapter = load_adapter(run / "adapter.safetensors", model)[0]
    instr = o.instr or config["instr"]
    if o.input and not instr:
        raise UserError(f'{run} takes many instructions: say which, as in --instr "make it winter"', 2)
    if o.input and model.width < 512:
        print("note: the embedded base knows only its own world of little houses; expect nothing true of photographs", file=sys.stderr)

    def run_edit(images, instructions):
        x = vae.encode(to_pixels(np.stack(images)).to(device))
        eps = torch.randn(x.shape, generator=noise).to(device)
        with autocast:
            return edit(model, adapter, x, text(instructions), eps, time_grid(o.steps, shift))

    if not o.input:
        held, target = config["held"], o.output or "edited.png"
        columns = [[data.load_image(run / row["path"], config["size"]) for row in held]]
        columns.append(to_images(vae.decode(run_edit(columns[0], [o.instr or row["instr"] for row in held]))))
        if not o.instr:                                     # how another edit is undone only its caption would say
            columns.append(to_images(vae.decode(run_edit(columns[1], [row["undo"] for row in held]))))
        data.write_image(target, contact_sheet(columns))
        asked = '", "'.join(dict.fromkeys(o.instr or row["instr"] for row in held))
        return print(f'"{asked}": {pathlib.Path(target).resolve()} (source, edit{", edit undone" if not o.instr else ""})')
    source, many = pathlib.Path(o.input), pathlib.Path(o.input).is_dir()
    paths = [source / p for p in data.find_images(source)] if many else [source]
    target, done = pathlib.Path(o.output or ("edited" if many else "edited.png")), 0
    for path in paths:
        try:
            image = data.load_image(path)
        except UserError as error:
            if not many:
                raise
            print(f"warning: skipped {error}", file=sys.stderr)
            continue
        h, w = working_size(*image.shape[:2], model, vae, math.prod(config["size"]) ** .5)
        y = run_edit([data.crop(image, (h, w))], [instr])
        where = (target / path.relative_to(source)).with_suffix(".png") if many else target
        data.write_image(where, to_images(vae.decode(y))[0])
        done += 1
    if not done:
        raise UserError(f"none of the images in {source} could be read")
    print(f'"{instr}": {done} picture{"s" * (done > 1)}, {target.resolve()}')


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(error.code)
