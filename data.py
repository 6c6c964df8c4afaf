"""A folder of unpaired pictures or clips -> (pixels, src, tgt, instr, undo) for each.

Captions come from metadata.jsonl (file_name, text) or, where that has none, from a .txt of the same stem. Prompts, from
most to least specific: a line of tuples.jsonl (file_name, src, tgt, instr, undo); the command line; a small grammar.
And the other way: files that are written whole or not at all, a run's card and page.
"""
import argparse
import contextlib
import itertools
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from fractions import Fraction

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model import ROOT, UserError, read_json, why

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}
VIDEOS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}        # suffix: what FFmpeg calls it
LONGEST = 128                                               # frames of a clip that training takes, its first
BROKEN = (OSError, ValueError, TypeError, SyntaxError, EOFError, LookupError, struct.error, Image.DecompressionBombError,
          Image.DecompressionBombWarning)                   # Pillow's complaints
TURNS = dict(enumerate("FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split(), 2))     # EXIF's orientations

# Families of words that exclude each other. member: (how captions say it, first one preferred; how instructions say it)
FAMILIES = [
    {w: ((w, *also), (w, *also)) for w, *also in (("spring",), ("summer",), ("autumn", "fall"), ("winter",))},
    {"day": (("at noon", "by day", "in daylight"), ("noon", "daytime", "day")),
     "sunset": (("at sunset", "at dusk"), ("sunset", "dusk")),
     "night": (("at night", "by night"), ("night",))},
    {"clear": (("in clear weather", "under a clear sky"), ("clear weather", "clear")),
     "fog": (("in fog", "in foggy weather"), ("foggy weather", "foggy", "fog")),
     "rain": (("in the rain", "in rainy weather"), ("rainy weather", "rainy", "rain")),
     "snowfall": (("in snowfall", "in snowy weather"), ("snowy weather", "snowy", "snowfall", "it snow"))},
    {c: ((c,), (c,)) for c in ("red", "blue", "yellow", "white", "purple", "green", "orange", "black", "pink", "brown")},
    {"sketch": (("a pencil sketch of", "a pencil drawing of"), ("pencil sketch", "pencil drawing")),
     "pixel": (("pixel art of", "a pixel art picture of"), ("pixel art",)),
     "blueprint": (("a blueprint of",), ("blueprint",)),
     **{w: ((f"a {w} of",), (w,)) for w in ("picture", "photo", "painting")}},
]
APPENDED = ("in {}", "{}", "{}", "{}", None)        # how a family's member joins a caption that names none of it


def _find(phrases, text):
    return next((p for p in sorted(phrases, key=len, reverse=True) if re.search(rf"\b{re.escape(p)}\b", text, re.I)), None)


def _swap(old, new, text):
    return re.sub(rf"\b{re.escape(old)}\b", lambda _: new, text, count=1, flags=re.I)


def _exchange(a, b, text):
    return _swap(a, b, _swap(b, "\0", text)).replace("\0", a)


def derive(instr: str, caption: str) -> tuple[str, str] | None:
    """The grammar: an instruction and a caption -> (tgt, undo), or None where the caption already says what is asked for.

    "make it winter", "a house in summer" -> "a house in winter", "make it summer". The undo is always self-contained.
    """
    back = f"make it {caption}"
    if m := re.match(r"remove (?:the |an? )?(.+)", instr, re.I):
        tgt = re.sub(rf"\s*\b(?:with|and|by|beside|next to|in)?\s*\b(?:the|an?)?\s*\b{re.escape(m[1])}\b", "", caption, flags=re.I).strip()
        return (tgt, back) if tgt != caption else None
    thing = (m := re.match(r"(?:add|put) (.+)", instr, re.I)) and m[1]         # "a red barn" wishes for no red house
    for family, appended in zip(FAMILIES, APPENDED):
        named = [(instr.lower().rfind(asked), member, asked) for member, (_, asks) in family.items() if (asked := _find(asks, instr))]
        if not named or thing and thing.lower() not in family[max(named)[1]][1]:
            continue
        _, member, asked = max(named)                       # of "paint the red house blue" the last
        says, tgt = family[member][0], caption
        if member in ("sunset", "night"):                   # to the base "on a summer day" is noon, whatever else is said
            tgt = re.sub(r"\bon an? (spring|summer|autumn|fall|winter) day\b", r"in \1", tgt, flags=re.I)
        said = [(other == member or not _find(asks, instr), caption.lower().find(words), other, words, asks)
                for other, (ways, asks) in family.items() if (words := _find(ways, caption))]
        if said:
            *_, other, words, asks = min(said)              # the one that the instruction names, or the first
            undo = _exchange(asked.removeprefix("it "), _find(asks, instr) or asks[0], instr)
            return None if other == member else (_swap(words, says[0], tgt), undo)
        return f"{tgt} {appended.format(says[0])}" if appended else f"{says[0]} {tgt}", back
    if m := re.match(r"(?:change|turn|replace) (.+?) (?:to|into|with) (.+)", instr, re.I):
        for a, b in (m.groups(), [re.sub(r"^(the|an?) ", "", thing, flags=re.I) for thing in m.groups()]):
            if _find([a], caption):
                return _swap(a, b, caption), _exchange(a, b, instr)
    wish = re.sub(r"^(?:make it|turn it into|change it to|paint) ?", "", instr, flags=re.I)
    return f"{caption} with {thing}" if thing else f"{caption}, {wish}", back


def read_jsonl(path: pathlib.Path, fields: Iterable[str]) -> dict[str, dict]:
    """A JSON-lines file as {file_name: line}. Every line needs file_name and `fields`, all strings."""
    rows = {}
    for n, line in enumerate(path.read_text("utf-8-sig", errors="replace").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                missing = [f for f in ("file_name", *fields) if not isinstance(row.get(f), str)]
            except (ValueError, AttributeError):
                raise UserError(f"{path}, line {n}: is no JSON object")
            if missing:
                raise UserError(f"{path}, line {n}: the field '{missing[0]}' is missing or no string")
            rows[row["file_name"]] = row
    return rows


def animated(path: pathlib.Path) -> bool:
    """Whether a picture file holds several frames."""
    if path.suffix.lower() in (".gif", ".webp", ".png"):
        with contextlib.suppress(*BROKEN), Image.open(path) as img:
            return getattr(img, "n_frames", 1) > 1
    return False


def find(folder: str | pathlib.Path, frames: int | None = None, without: Iterable[str | pathlib.Path] = ()) -> tuple[list[pathlib.Path], bool]:
    """The pictures, or the clips, of a folder and below (not below those in `without`), sorted, relative to it. -> paths, whether they are clips

    Clips are videos, animated pictures and, where frames says that clips are wanted, folders of numbered pictures. With frames = 1 all
    are pictures. Raises UserError where there are none, or both."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; --data wants a folder of images or clips", 2)
    without = {w for w in (pathlib.Path(w).resolve() for w in without) if folder.resolve() in w.parents}
    paths = {p.relative_to(folder) for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES | VIDEOS.keys() and p.is_file()
             and without.isdisjoint(p.resolve().parents)}
    clips = {p for p in paths if p.suffix.lower() in VIDEOS or frames != 1 and animated(folder / p)}
    if (frames or 1) > 1:
        numbered = {p for p in paths - clips if p.stem.isdigit() and p.parent.name}
        paths, clips = paths - numbered | {p.parent for p in numbered}, clips | {p.parent for p in numbered}
    if not paths:
        raise UserError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}) and no clips ({', '.join(sorted(VIDEOS))})")
    if clips and clips != paths:
        raise UserError(f"{folder} mixes clips ({min(clips)}) and pictures ({min(paths - clips)}); keep them in folders of their own, "
                        "or give --frames 1 to take animated pictures for still ones")
    return sorted(paths), bool(clips)


def read_prompts(folder: str | pathlib.Path, paths: list[pathlib.Path], instr: str | None = None, src: str | None = None, tgt: str | None = None,
                 undo: str | None = None) -> list[dict]:
    """-> list of dicts with path, src, tgt, instr, undo, of tuples.jsonl own_noise, too; prints what was found and what was derived."""
    folder = pathlib.Path(folder)
    tuples, captions = folder / "tuples.jsonl", folder / "metadata.jsonl"
    tuples = read_jsonl(tuples, ("src", "tgt", "instr", "undo")) if tuples.exists() else {}
    captions = read_jsonl(captions, ("text",)) if captions.exists() else {}
    for name in sorted({*tuples, *captions} - {p.as_posix() for p in paths}):
        raise UserError(f"{folder}: a .jsonl file names '{name}', which is no image of this folder; correct or remove the line")
    if instr and len(tuples) == len(paths):
        raise UserError(f"{folder}/tuples.jsonl has an instruction for every image already: leave --instr away, or take that file out", 2)
    rows, captioned = [], 0
    for path in paths:
        name, note = path.as_posix(), (folder / path).with_suffix(".txt")
        if name in tuples:
            line = {"own_noise": False} | tuples[name]
            if not isinstance(line["own_noise"], bool):
                raise UserError(f"{folder}/tuples.jsonl: own_noise of '{name}' must be true or false, without quotes")
            rows.append({"path": folder / path} | {k: line[k] for k in ("src", "tgt", "instr", "undo", "own_noise")})
            continue
        if instr is None:
            raise UserError(f"no instruction for {folder / path}: give --instr \"make it winter\", or a tuples.jsonl with a line for each image", 2)
        caption = captions[name]["text"] if name in captions else note.read_text("utf-8-sig", "replace").strip() if note.exists() else None
        captioned += caption is not None
        caption = src or caption or "a picture"
        if derived := (tgt, undo) if tgt and undo else derive(instr, caption):
            rows.append({"path": folder / path, "src": caption, "tgt": tgt or derived[0], "instr": instr, "undo": undo or derived[1]})
    print(f"{len(paths)} images in {folder}, {captioned} captioned, {len(tuples)} with full prompts"
          + (f"; {len(paths) - len(rows)} left out: their caption already says what is asked for" * (len(rows) < len(paths))), file=sys.stderr)
    if not rows:
        raise UserError(f"no caption in {folder} is changed by '{instr}': nothing to learn from")
    for row in {(r["src"], r["instr"]): r for r in rows[:3]}.values():
        print("  " + "\n  ".join(f"{k:5} {row[k]}" for k in ("src", "instr", "tgt", "undo")), file=sys.stderr)
    return rows


def crop(picture: np.ndarray, size: tuple[int, int], zoom: float = 1., at: tuple[float, float] = (.5, .5), mirrored: bool = False) -> np.ndarray:
    """picture (H, W, 3) uint8, cropped to the aspect of size (h, w) and resized with antialiasing; the crop is `zoom` times the
    largest possible, `at` places it (0: left or top, 1: right or bottom). -> (h, w, 3) uint8"""
    img = Image.fromarray(picture)
    h, w = (s * zoom * min(img.height / size[0], img.width / size[1]) for s in size)
    top, left = max(0, (img.height - h) * at[1]), max(0, (img.width - w) * at[0])           # h may exceed by a rounding
    img = img.resize(size[::-1], Image.Resampling.LANCZOS, box=(left, top, min(left + w, img.width), min(top + h, img.height)))
    return np.asarray(ImageOps.mirror(img) if mirrored else img)


def upright(img: Image.Image) -> Image.Image:
    """A PIL image as it is to be seen: EXIF's turn done, transparent on white, 16 bit and float greyscale scaled. -> (h, w, 3) uint8"""
    img.load()                                              # a TIFF turns itself here
    if turn := TURNS.get(img.getexif().get(0x112)):         # ImageOps.exif_transpose writes EXIF anew, and stumbles over an odd tag
        img = img.transpose(Image.Transpose[turn])
    if img.mode.startswith(("I", "F")):
        a = np.asarray(img, np.float32)
        top = 65535 if a.max() > 255 else 255 if a.max() > 1 else 1
        img = Image.fromarray((a / top * 255).clip(0, 255).astype(np.uint8))
    if img.mode in ("P", "PA", "LA", "La", "RGBa") or "transparency" in img.info:
        img = img.convert("RGBA")
    if img.mode == "RGBA":
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
    return np.asarray(img.convert("RGB"))


def load_image(path: pathlib.Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """One picture; with size (h, w) the largest centred `crop`. -> (h, w, 3) uint8. Raises UserError where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = upright(Image.open(path))
    except BROKEN as error:
        raise UserError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})")
    return picture if size is None else crop(picture, size)


def with_av(path):
    """PyAV, which only videos need."""
    try:
        import av
        return av
    except ImportError:
        raise UserError(f"{path}: videos need PyAV: pip install av; or use an animated WebP or GIF, or a folder of numbered pictures")


def read_frames(path: pathlib.Path) -> Iterator[tuple[np.ndarray, float]]:
    """Yields a clip's frames, one at a time, as (picture (h, w, 3) uint8, seconds from the beginning). Numbered pictures: eight a second.
    Raises UserError where it cannot be read, also after some frames."""
    path = pathlib.Path(path)
    if path.is_dir():
        for i, p in enumerate(sorted((p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.stem.isdigit()), key=lambda p: int(p.stem))):
            yield load_image(p), i / 8
    elif path.suffix.lower() in VIDEOS:
        av, first = with_av(path), None
        try:
            with av.open(str(path)) as file:
                for frame in file.decode(video=0):
                    first = frame.time if first is None else first
                    yield np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90), frame.time - first
        except (av.error.FFmpegError, IndexError, TypeError, OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as a video ({why(error)})")
        if first is None:
            raise UserError(f"{path}: cannot be read as a video (it has no frames)")
    else:
        try:
            with Image.open(path) as img:
                now = 0
                for i in range(getattr(img, "n_frames", 1)):
                    img.seek(i)
                    img.load()                              # a WebP tells the duration only now
                    yield upright(img), now / 1000
                    now += img.info.get("duration") or 100
        except BROKEN as error:
            raise UserError(f"{path}: cannot be read as an animated picture ({why(error)})")


def load_rows(rows: list[dict], size: tuple[int, int], views: int = 1, seed: int = 0, frames: int = 1,
              stride: int = 1) -> Iterator[tuple[np.ndarray, dict]]:
    """Yields every row's picture as (views, h, w, 3) uint8, and the row; the unreadable are left out with a warning. The first view is
    the picture, the others are random crops of .8 to 1 of it, half of them mirrored. One at a time: a large folder needs no memory.
    frames above 1: clips, (T, h, w, 3), every stride-th frame; those with less than `frames` of these are left out."""
    good, rng = 0, np.random.default_rng(seed % 2 ** 32)
    for row in rows:
        others = [dict(zoom=rng.uniform(.8, 1), at=rng.uniform(0, 1, 2), mirrored=rng.random() < .5) for _ in range(views - 1)]
        try:
            if frames == 1:
                picture = load_image(row["path"])
                pictures = [crop(picture, size, **view) for view in [{}, *others]]
            else:
                pictures = [crop(f, size) for f, _ in itertools.islice(read_frames(row["path"]), 0, LONGEST * stride, stride)]
                if len(pictures) < frames:
                    raise UserError(f"{row['path']}: has {len(pictures)} frames at --stride {stride}, fewer than --frames {frames}")
        except UserError as error:
            print(f"warning: skipped {error}", file=sys.stderr)
            continue
        good += 1
        yield np.stack(pictures), row
    if not good:
        raise UserError(f"none of the {'images' if frames == 1 else 'clips'} could be read")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary name beside path; what was written there becomes path, which is complete or as it was before."""
    tmp = path.with_name(f"{path.stem[:50]}{path.suffix}.tmp")      # no longer than path's own, which may be as long as names can be
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        with open(tmp, "rb+") as file:
            os.fsync(file.fileno())                         # on the disk before it takes the old one's place
        tmp.replace(path)
    except (OSError, SafetensorError) as error:             # a full disk, a folder one may not write to
        raise UserError(f"{path} cannot be written ({error}); what was saved before is unharmed")
    finally:                                                # nothing half done stays, also where a clip turns out broken midway
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)


def write(path: pathlib.Path, text: str | dict) -> None:
    """Text, or data as JSON."""
    with replacing(path) as tmp:
        tmp.write_text(text if isinstance(text, str) else json.dumps(text, indent=2) + "\n", "utf-8")


def write_tensors(path: pathlib.Path, tensors: dict[str, Tensor], **meta) -> None:
    with replacing(path) as tmp:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, tmp, {k: str(v) for k, v in meta.items()})
        tmp.chmod(0o644)                                    # safetensors' files can be read by their owner alone


def write_image(path: str | pathlib.Path, picture: np.ndarray | Image.Image) -> None:
    """picture (h, w, 3) uint8 or a PIL image; the suffix says the format."""
    path = pathlib.Path(path)
    if (kind := Image.registered_extensions().get(path.suffix.lower())) not in Image.SAVE:
        raise UserError(f"{path}: no picture can be written under this name; end it in .png, .jpg or .webp", 2)
    with replacing(path) as tmp:
        (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(tmp, kind)


def write_clip(path: str | pathlib.Path, frames: Iterable[tuple[np.ndarray, float]], like: pathlib.Path | None = None) -> None:
    """frames: an iterable of (picture (h, w, 3) uint8, seconds), of at least one, as read_frames yields them. The suffix says the format,
    none is a folder of numbered pictures. A video is written frame by frame, with the rate and the sound of the video `like`."""
    path = pathlib.Path(path)
    if not path.suffix:
        for i, (picture, _) in enumerate(frames):
            write_image(path / f"{i:05d}.png", picture)
    elif path.suffix.lower() in VIDEOS:
        av = with_av(path)
        with replacing(path) as tmp, contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(av.open(str(tmp), "w", format=VIDEOS[path.suffix.lower()]))
                source = stack.enter_context(av.open(str(like))) if like and pathlib.Path(like).suffix.lower() in VIDEOS else None
                base = source.streams.video[0].time_base if source else Fraction(1, 1000)
                rate = source.streams.video[0].average_rate if source else 8
                stream = file.add_stream("libvpx-vp9" if path.suffix.lower() == ".webm" else "libx264", rate=rate)
                sound = source.streams.audio[0] if source and source.streams.audio else None
                copy = file.add_stream_from_template(sound) if sound else None
                for i, (picture, seconds) in enumerate(frames):
                    if i == 0:
                        (stream.height, stream.width), stream.codec_context.time_base = picture.shape[:2], base
                        stream.pix_fmt = "yuv444p" if stream.height % 2 or stream.width % 2 else "yuv420p"     # 420 has even sizes only
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
                    frame.pts, frame.time_base = round(seconds / base), base
                    file.mux(stream.encode(frame))
                file.mux(stream.encode())
                for packet in source.demux(sound) if sound else ():
                    if packet.dts is not None:
                        packet.stream = copy
                        file.mux(packet)
            except (av.error.FFmpegError, IndexError, ValueError) as error:
                raise OSError(why(error))                   # `replacing` cleans up and says it
    else:
        pictures, times = zip(*((Image.fromarray(p), s) for p, s in frames))
        if (kind := Image.registered_extensions().get(path.suffix.lower())) not in ("WEBP", "GIF", "PNG"):
            raise UserError(f"{path}: no clip can be written under this name; end it in .mp4, .mov, .mkv, .webm, .webp, .gif or .png", 2)
        unit = 10 if kind == "GIF" else 1                   # milliseconds; rounded in sum, so that nothing drifts
        lasts = [unit * (round(1000 * b / unit) - round(1000 * a / unit)) for a, b in zip(times, times[1:])] or [125]
        with replacing(path) as tmp:
            pictures[0].save(tmp, kind, save_all=True, append_images=pictures[1:], duration=[*lasts, lasts[-1]], loop=0,
                             **{"quality": 90, "method": 4} if kind == "WEBP" else {})


# ---- what a run leaves to read ------------------------------------------------------------------------------------
def origin() -> dict[str, str]:
    """What a run was made of. -> dict of command, commit, versions"""
    git = lambda *args: subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""    # noqa: E731
    dirty = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")  # only code: tables and pictures change while they are made
    commit = git("describe", "--always") + "-dirty" * bool(dirty)
    return {"command": f"python {shlex.join(sys.argv)}", "commit": commit or "unknown", "python": platform.python_version(),
            "torch": torch.__version__, "machine": platform.machine()}


def card(o: argparse.Namespace, made: dict[str, str]) -> str:
    return f"""---
base_model: {o.base}
tags: [image-to-image, lora, bootstrap-your-generator, unpaired]
---
# {f'An editor for "{o.instr}"' if o.instr else "An editor for many instructions"}

Trained without pairs by nanoByG: `{made["command"]}`

Use: `python sample.py --run {o.out} --input picture.png --output edited.png{"" if o.instr else ' --instr "make it winter"'}`. The adapter
holds the source's projection and gate besides its LoRA; other tools may load the LoRA, but cannot edit with it.

Made with seed {o.seed}, nanoByG {made["commit"]}, torch {made["torch"]}, Python {made["python"]}, {made["machine"]};
data {made["fingerprint"]}.

![source, edit, edit undone](samples/latest.png)
"""


def page(out: pathlib.Path) -> None:
    """Writes index.html, which opens from disk: pictures over the steps, curves, prompts. The template is bench/page.html."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    run = {"config": read_json(out / "config.json"), "log": log[::-max(1, len(log) // 1000)][::-1],
           "sheets": sorted(p.name for p in (out / "samples").glob("[0-9]*.png"))}
    template = (ROOT / "bench" / "page.html").read_text("utf-8")
    write(out / "index.html", template.replace("__RUN__", json.dumps(run).replace("</", "<\\/")))
