"""A folder of unpaired pictures -> (pixels, src, tgt, instr, undo) for each.

Captions come from metadata.jsonl (file_name, text) or, where that has none, from a .txt of the same stem. Prompts, from
most to least specific: a line of tuples.jsonl (file_name, src, tgt, instr, undo); the command line; a small grammar.
And the other way: files that are written whole or not at all, a run's card and page.
"""
import contextlib
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save_file

from model import ROOT, UserError, read_json

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}

# Families of words that exclude each other. member: (how captions say it, first one preferred; how instructions say it)
FAMILIES = [
    {w: ((w, *also), (w, *also)) for w, *also in (("spring",), ("summer",), ("autumn", "fall"), ("winter",))},
    {"day": (("at noon", "by day", "in daylight"), ("noon", "daytime", "day")),
     "sunset": (("at sunset", "at dusk"), ("sunset", "dusk")),
     "night": (("at night", "by night"), ("night",))},
    {"clear": (("in clear weather", "under a clear sky"), ("clear weather", "clear")),
     "fog": (("in fog", "in foggy weather"), ("foggy weather", "foggy", "fog")),
     "rain": (("in the rain", "in rainy weather"), ("rainy weather", "rainy", "rain")),
     "snowfall": (("in snowfall", "in snowy weather"), ("snowy weather", "snowy", "snowfall"))},
    {c: ((c,), (c,)) for c in ("red", "blue", "yellow", "white", "purple", "green", "orange", "black", "pink", "brown")},
    {"sketch": (("a pencil sketch of", "a pencil drawing of"), ("pencil sketch", "pencil drawing")),
     "pixel": (("pixel art of", "a pixel art picture of"), ("pixel art",)),
     "blueprint": (("a blueprint of",), ("blueprint",)),
     "plain": (("a painting of", "a picture of", "a photo of"), ("painting", "picture", "photo"))},
]
APPENDED = ("in {}", "{}", "{}", "{}", None)        # how a family's member joins a caption that names none of it


def _find(phrases, text):
    return next((p for p in sorted(phrases, key=len, reverse=True) if re.search(rf"\b{re.escape(p)}\b", text, re.I)), None)


def _swap(old, new, text):
    return re.sub(rf"\b{re.escape(old)}\b", lambda _: new, text, count=1, flags=re.I)


def derive(instr, caption):
    """The grammar: an instruction and a caption -> (tgt, undo), or None where the caption already says what is asked for.

    "make it winter", "a house in summer" -> "a house in winter", "make it summer". The undo is always self-contained.
    """
    for family, appended in zip(FAMILIES, APPENDED):
        for member, (says, asks) in family.items():
            if (asked := _find(asks, instr)) is None:
                continue
            for other, (says_other, asks_other) in family.items():
                if (said := _find(says_other, caption)) is not None:
                    if other == member:
                        return None
                    return _swap(said, says[0], caption), _swap(asked, asks_other[0], instr)
            if appended:
                return f"{caption} {appended.format(says[0])}", f"make it {caption}"
            return f"{says[0]} {caption}", f"make it {caption}"
    if (m := re.match(r"(?:change|turn|replace) (.+?) (?:to|into|with) (.+)", instr, re.I)) and _find([m[1]], caption):
        return _swap(m[1], m[2], caption), _swap(m[1], "\0", _swap(m[2], m[1], instr)).replace("\0", m[2])
    if m := re.match(r"remove (?:the |a |an )?(.+)", instr, re.I):
        return re.sub(rf"\s*\b(?:with|and|by|beside|next to)?\s*(?:the|an?)?\s*{re.escape(m[1])}\b", "", caption), f"make it {caption}"
    wish = re.sub(r"^(?:make it|turn it into|change it to|paint|add|put) ?", "", instr, flags=re.I)
    return f"{caption} with {wish}" if instr.lower().startswith(("add", "put")) else f"{caption}, {wish}", f"make it {caption}"


def read_jsonl(path, fields):
    """A JSON-lines file as {file_name: line}. Every line needs file_name and `fields`, all strings."""
    rows = {}
    for n, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
                missing = [f for f in ("file_name", *fields) if not isinstance(row[f], str)]
            except (ValueError, TypeError):
                raise UserError(f"{path}, line {n}: is no JSON object")
            except KeyError as error:
                raise UserError(f"{path}, line {n}: the field {error} is missing")
            if missing:
                raise UserError(f"{path}, line {n}: the field '{missing[0]}' must be a string")
            rows[row["file_name"]] = row
    return rows


def find_images(folder):
    """The image files of a folder and below, sorted, as paths relative to it."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; --data wants a folder of images", 2)
    paths = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise UserError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    return paths


def read_prompts(folder, paths, instr=None, src=None, tgt=None, undo=None):
    """-> list of dicts with path, src, tgt, instr, undo; prints what was found and what was derived."""
    folder = pathlib.Path(folder)
    tuples, captions = folder / "tuples.jsonl", folder / "metadata.jsonl"
    tuples = read_jsonl(tuples, ("src", "tgt", "instr", "undo")) if tuples.exists() else {}
    captions = read_jsonl(captions, ("text",)) if captions.exists() else {}
    names = {p.as_posix() for p in paths}
    for name in [*tuples, *captions]:
        if name not in names:
            raise UserError(f"{folder}: a .jsonl file names '{name}', which is no image of this folder; correct or remove the line")
    rows, captioned, satisfied = [], 0, 0
    for path in paths:
        name, note = path.as_posix(), (folder / path).with_suffix(".txt")
        if name in tuples and instr is None:
            rows.append({"path": folder / path} | {k: tuples[name][k] for k in ("src", "tgt", "instr", "undo")})
            continue
        if instr is None:
            raise UserError(f"no instruction for {folder / path}: give --instr \"make it winter\", or a tuples.jsonl with a line for each image", 2)
        caption = captions[name]["text"] if name in captions else note.read_text("utf-8", "replace").strip() if note.exists() else None
        captioned += caption is not None
        caption = src or caption or "a picture"
        derived = (tgt or caption, undo or f"make it {caption}") if tgt and undo else derive(instr, caption)
        if derived is None:
            satisfied += 1
            continue
        rows.append({"path": folder / path, "src": caption, "tgt": tgt or derived[0], "instr": instr, "undo": undo or derived[1]})
    print(f"{len(paths)} images in {folder}, {captioned} captioned, {len(tuples)} with full prompts"
          + (f"; {satisfied} left out: their caption already says what is asked for" if satisfied else ""), file=sys.stderr)
    if not rows:
        raise UserError(f"every caption in {folder} already says '{instr}': nothing to learn from")
    for row in {(r["src"], r["instr"]): r for r in rows[:3]}.values():
        print("  " + "\n  ".join(f"{k:5} {row[k]}" for k in ("src", "instr", "tgt", "undo")), file=sys.stderr)
    return rows


def crop(picture, size, zoom=1., at=(.5, .5), mirrored=False):
    """picture (H, W, 3) uint8, cropped to the aspect of size (h, w) and resized with antialiasing; the crop is `zoom` times the
    largest possible, `at` places it (0: left or top, 1: right or bottom). -> (h, w, 3) uint8"""
    img = Image.fromarray(picture)
    h, w = (s * zoom * min(img.height / size[0], img.width / size[1]) for s in size)
    top, left = max(0, (img.height - h) * at[1]), max(0, (img.width - w) * at[0])           # h may exceed by a rounding
    img = img.resize(size[::-1], Image.Resampling.LANCZOS, box=(left, top, min(left + w, img.width), min(top + h, img.height)))
    return np.asarray(ImageOps.mirror(img) if mirrored else img)


def load_image(path, size=None):
    """One picture, upright, RGB on white; with size (h, w) the largest centred `crop`.
    -> (h, w, 3) uint8. Raises UserError where the file cannot be read as an image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            img = ImageOps.exif_transpose(Image.open(path))
            if img.mode.startswith(("I", "F")):                                     # 16 bit and float greyscale
                a = np.asarray(img, np.float32)
                top = 65535 if a.max() > 255 else 255 if a.max() > 1 else 1
                img = Image.fromarray((a / top * 255).clip(0, 255).astype(np.uint8))
            if img.mode in ("P", "PA", "LA", "La", "RGBa") or "transparency" in img.info:
                img = img.convert("RGBA")
            if img.mode == "RGBA":
                img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
            img = img.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})")
    return np.asarray(img) if size is None else crop(np.asarray(img), size)


def load_rows(rows, size, views=1, seed=0):
    """Yields every row's picture as (views, h, w, 3) uint8, and the row; the unreadable are left out with a warning. The first view is
    the picture, the others are random crops of .8 to 1 of it, half of them mirrored. One at a time: a large folder needs no memory."""
    good, rng = 0, np.random.default_rng(seed)
    for row in rows:
        others = [dict(zoom=rng.uniform(.8, 1), at=rng.uniform(0, 1, 2), mirrored=rng.random() < .5) for _ in range(views - 1)]
        try:
            picture = load_image(row["path"])
        except UserError as error:
            print(f"warning: skipped {error}", file=sys.stderr)
            continue
        good += 1
        yield np.stack([crop(picture, size, **view) for view in [{}, *others]]), row
    if not good:
        raise UserError("none of the images could be read")


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary name beside path; what was written there becomes path, which is complete or as it was before."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        with open(tmp, "rb+") as file:
            os.fsync(file.fileno())                         # on the disk before it takes the old one's place
        tmp.replace(path)
    except (OSError, SafetensorError) as error:             # a full disk, a folder one may not write to
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error}); what was saved before is unharmed")


def write(path, text):
    """Text, or data as JSON."""
    with replacing(path) as tmp:
        tmp.write_text(text if isinstance(text, str) else json.dumps(text, indent=2) + "\n", "utf-8")


def write_tensors(path, tensors, **meta):
    with replacing(path) as tmp:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, tmp, {k: str(v) for k, v in meta.items()})


def write_image(path, picture):
    """picture (h, w, 3) uint8 or a PIL image; the suffix says the format."""
    path = pathlib.Path(path)
    if (kind := Image.registered_extensions().get(path.suffix.lower())) not in Image.SAVE:
        raise UserError(f"{path}: no picture can be written under this name; end it in .png, .jpg or .webp", 2)
    with replacing(path) as tmp:
        (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(tmp, kind)


# ---- what a run leaves to read ------------------------------------------------------------------------------------
def origin():
    """What a run was made of. -> dict of command, commit, versions"""
    git = shutil.which("git") and subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"command": f"python {shlex.join(sys.argv)}", "commit": git or "unknown", "python": platform.python_version(),
            "torch": torch.__version__, "machine": platform.machine()}


def card(o, made):
    return f"""---
base_model: {o.base}
tags: [image-to-image, lora, bootstrap-your-generator, unpaired]
---
# {f'An editor for "{o.instr}"' if o.instr else "An editor for many instructions"}

Trained without pairs by nanoByG: `{made["command"]}`

Use: `python sample.py --run {o.out} --input picture.png --output edited.png{"" if o.instr else ' --instr "make it winter"'}`. The adapter
holds a source projection besides its LoRA; other tools may load the LoRA, but cannot edit with it.

Made with seed {o.seed}, nanoByG {made["commit"]}, torch {made["torch"]}, Python {made["python"]}, {made["machine"]};
data {made["fingerprint"]}.

![source, edit, edit undone](samples/latest.png)
"""


def page(out):
    """Writes index.html, which opens from disk: pictures over the steps, curves, prompts. The template is bench/page.html."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    run = {"config": read_json(out / "config.json"), "log": log[::-max(1, len(log) // 1000)][::-1],
           "sheets": sorted(p.name for p in (out / "samples").glob("[0-9]*.png"))}
    template = (ROOT / "bench" / "page.html").read_text("utf-8")
    write(out / "index.html", template.replace("__RUN__", json.dumps(run).replace("</", "<\\/")))
