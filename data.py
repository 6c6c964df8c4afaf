"""A folder of unpaired pictures or clips -> (pixels, src, tgt, instr, undo) for each.

Captions come from metadata.jsonl (file_name, text) or, where that has none, from a .txt of the same stem. Prompts, from
most to least specific: a line of tuples.jsonl (file_name, src, tgt, instr, undo); the command line; a small grammar.
And the other way: files that are written whole or not at all, a run's card and page.
"""

import itertools
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from files.clips import VIDEOS, animated, read_frames
from files.disk import UserError
from files.pictures import SUFFIXES, crop, load_image

LONGEST = 128  # frames of a clip that training takes, its first

# Families of words that exclude each other. member: (how captions say it, first one preferred; how instructions say it)
FAMILIES = [
    {
        w: ((w, *also), (w, *also))
        for w, *also in (("spring",), ("summer",), ("autumn", "fall"), ("winter",))
    },
    {
        "day": (("at noon", "by day", "in daylight"), ("noon", "daytime", "day")),
        "sunset": (("at sunset", "at dusk"), ("sunset", "dusk")),
        "night": (("at night", "by night"), ("night",)),
    },
    {
        "clear": (("in clear weather", "under a clear sky"), ("clear weather", "clear")),
        "fog": (("in fog", "in foggy weather"), ("foggy weather", "foggy", "fog")),
        "rain": (("in the rain", "in rainy weather"), ("rainy weather", "rainy", "rain")),
        "snowfall": (
            ("in snowfall", "in snowy weather"),
            ("snowy weather", "snowy", "snowfall", "it snow"),
        ),
    },
    {
        c: ((c,), (c,))
        for c in (
            "red",
            "blue",
            "yellow",
            "white",
            "purple",
            "green",
            "orange",
            "black",
            "pink",
            "brown",
        )
    },
    {
        "sketch": (
            ("a pencil sketch of", "a pencil drawing of"),
            ("pencil sketch", "pencil drawing"),
        ),
        "pixel": (("pixel art of", "a pixel art picture of"), ("pixel art",)),
        "blueprint": (("a blueprint of",), ("blueprint",)),
        **{w: ((f"a {w} of",), (w,)) for w in ("picture", "photo", "painting")},
    },
]
APPENDED = (
    "in {}",
    "{}",
    "{}",
    "{}",
    None,
)  # how a family's member joins a caption that names none of it


def _find(phrases, text):
    return next(
        (
            p
            for p in sorted(phrases, key=len, reverse=True)
            if re.search(rf"\b{re.escape(p)}\b", text, re.I)
        ),
        None,
    )


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
        tgt = re.sub(
            rf"\s*\b(?:with|and|by|beside|next to|in)?\s*\b(?:the|an?)?\s*\b{re.escape(m[1])}\b",
            "",
            caption,
            flags=re.I,
        ).strip()
        return (tgt, back) if tgt != caption else None
    thing = (m := re.match(r"(?:add|put) (.+)", instr, re.I)) and m[
        1
    ]  # "a red barn" wishes for no red house
    for family, appended in zip(FAMILIES, APPENDED):
        named = [
            (instr.lower().rfind(asked), member, asked)
            for member, (_, asks) in family.items()
            if (asked := _find(asks, instr))
        ]
        if not named or thing and thing.lower() not in family[max(named)[1]][1]:
            continue
        _, member, asked = max(named)  # of "paint the red house blue" the last
        says, tgt = family[member][0], caption
        if member in (
            "sunset",
            "night",
        ):  # to the base "on a summer day" is noon, whatever else is said
            tgt = re.sub(
                r"\bon an? (spring|summer|autumn|fall|winter) day\b", r"in \1", tgt, flags=re.I
            )
        said = [
            (
                other == member or not _find(asks, instr),
                caption.lower().find(words),
                other,
                words,
                asks,
            )
            for other, (ways, asks) in family.items()
            if (words := _find(ways, caption))
        ]
        if said:
            *_, other, words, asks = min(said)  # the one that the instruction names, or the first
            undo = _exchange(asked.removeprefix("it "), _find(asks, instr) or asks[0], instr)
            return None if other == member else (_swap(words, says[0], tgt), undo)
        return f"{tgt} {appended.format(says[0])}" if appended else f"{says[0]} {tgt}", back
    if m := re.match(r"(?:change|turn|replace) (.+?) (?:to|into|with) (.+)", instr, re.I):
        for a, b in (
            m.groups(),
            [re.sub(r"^(the|an?) ", "", thing, flags=re.I) for thing in m.groups()],
        ):
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
                raise UserError(
                    f"{path}, line {n}: the field '{missing[0]}' is missing or no string"
                )
            rows[row["file_name"]] = row
    return rows


def find(
    folder: str | pathlib.Path,
    frames: int | None = None,
    without: Iterable[str | pathlib.Path] = (),
) -> tuple[list[pathlib.Path], bool]:
    """The pictures, or the clips, of a folder and below (not below those in `without`), sorted, relative to it. -> paths, whether they are clips

    Clips are videos, animated pictures and, where frames says that clips are wanted, folders of numbered pictures. With frames = 1 all
    are pictures. Raises UserError where there are none, or both."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; --data wants a folder of images or clips", 2)
    without = {
        w for w in (pathlib.Path(w).resolve() for w in without) if folder.resolve() in w.parents
    }
    paths = {
        p.relative_to(folder)
        for p in folder.rglob("*")
        if p.suffix.lower() in SUFFIXES | VIDEOS.keys()
        and p.is_file()
        and without.isdisjoint(p.resolve().parents)
    }
    clips = {p for p in paths if p.suffix.lower() in VIDEOS or frames != 1 and animated(folder / p)}
    if (frames or 1) > 1:
        numbered = {p for p in paths - clips if p.stem.isdigit() and p.parent.name}
        paths, clips = (
            paths - numbered | {p.parent for p in numbered},
            clips | {p.parent for p in numbered},
        )
    if not paths:
        raise UserError(
            f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}) and no clips ({', '.join(sorted(VIDEOS))})"
        )
    if clips and clips != paths:
        raise UserError(
            f"{folder} mixes clips ({min(clips)}) and pictures ({min(paths - clips)}); keep them in folders of their own, "
            "or give --frames 1 to take animated pictures for still ones"
        )
    return sorted(paths), bool(clips)


def read_prompts(
    folder: str | pathlib.Path,
    paths: list[pathlib.Path],
    instr: str | None = None,
    src: str | None = None,
    tgt: str | None = None,
    undo: str | None = None,
) -> list[dict]:
    """-> list of dicts with path, src, tgt, instr, undo, of tuples.jsonl own_noise, too; prints what was found and what was derived."""
    folder = pathlib.Path(folder)
    tuples, captions = folder / "tuples.jsonl", folder / "metadata.jsonl"
    tuples = read_jsonl(tuples, ("src", "tgt", "instr", "undo")) if tuples.exists() else {}
    captions = read_jsonl(captions, ("text",)) if captions.exists() else {}
    for name in sorted({*tuples, *captions} - {p.as_posix() for p in paths}):
        raise UserError(
            f"{folder}: a .jsonl file names '{name}', which is no image of this folder; correct or remove the line"
        )
    if instr and len(tuples) == len(paths):
        raise UserError(
            f"{folder}/tuples.jsonl has an instruction for every image already: leave --instr away, or take that file out",
            2,
        )
    rows, captioned = [], 0
    for path in paths:
        name, note = path.as_posix(), (folder / path).with_suffix(".txt")
        if name in tuples:
            line = {"own_noise": False} | tuples[name]
            if not isinstance(line["own_noise"], bool):
                raise UserError(
                    f"{folder}/tuples.jsonl: own_noise of '{name}' must be true or false, without quotes"
                )
            rows.append(
                {"path": folder / path}
                | {k: line[k] for k in ("src", "tgt", "instr", "undo", "own_noise")}
            )
            continue
        if instr is None:
            raise UserError(
                f'no instruction for {folder / path}: give --instr "make it winter", or a tuples.jsonl with a line for each image',
                2,
            )
        caption = (
            captions[name]["text"]
            if name in captions
            else note.read_text("utf-8-sig", "replace").strip()
            if note.exists()
            else None
        )
        captioned += caption is not None
        caption = src or caption or "a picture"
        if derived := (tgt, undo) if tgt and undo else derive(instr, caption):
            rows.append(
                {
                    "path": folder / path,
                    "src": caption,
                    "tgt": tgt or derived[0],
                    "instr": instr,
                    "undo": undo or derived[1],
                }
            )
    print(
        f"{len(paths)} images in {folder}, {captioned} captioned, {len(tuples)} with full prompts"
        + (
            f"; {len(paths) - len(rows)} left out: their caption already says what is asked for"
            * (len(rows) < len(paths))
        ),
        file=sys.stderr,
    )
    if not rows:
        raise UserError(f"no caption in {folder} is changed by '{instr}': nothing to learn from")
    for row in {(r["src"], r["instr"]): r for r in rows[:3]}.values():
        print(
            "  " + "\n  ".join(f"{k:5} {row[k]}" for k in ("src", "instr", "tgt", "undo")),
            file=sys.stderr,
        )
    return rows


def load_rows(
    rows: list[dict],
    size: tuple[int, int],
    views: int = 1,
    seed: int = 0,
    frames: int = 1,
    stride: int = 1,
) -> Iterator[tuple[np.ndarray, dict]]:
    """Yields every row's picture as (views, h, w, 3) uint8, and the row; the unreadable are left out with a warning. The first view is
    the picture, the others are random crops of .8 to 1 of it, half of them mirrored. One at a time: a large folder needs no memory.
    frames above 1: clips, (T, h, w, 3), every stride-th frame; those with less than `frames` of these are left out."""
    good, rng = 0, np.random.default_rng(seed % 2**32)
    for row in rows:
        others = [
            dict(zoom=rng.uniform(0.8, 1), at=rng.uniform(0, 1, 2), mirrored=rng.random() < 0.5)
            for _ in range(views - 1)
        ]
        try:
            if frames == 1:
                picture = load_image(row["path"])
                pictures = [crop(picture, size, **view) for view in [{}, *others]]
            else:
                pictures = [
                    crop(f, size)
                    for f, _ in itertools.islice(
                        read_frames(row["path"]), 0, LONGEST * stride, stride
                    )
                ]
                if len(pictures) < frames:
                    raise UserError(
                        f"{row['path']}: has {len(pictures)} frames at --stride {stride}, fewer than --frames {frames}"
                    )
        except UserError as error:
            print(f"warning: skipped {error}", file=sys.stderr)
            continue
        good += 1
        yield np.stack(pictures), row
    if not good:
        raise UserError(f"none of the {'images' if frames == 1 else 'clips'} could be read")


# ---- what a run leaves to read ------------------------------------------------------------------------------------
