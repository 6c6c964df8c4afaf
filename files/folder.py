"""What a folder holds: pictures or clips, and the lines of a .jsonl file beside them."""

import itertools
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from files.clips import VIDEOS, animated, read_frames
from files.disk import UserError
from files.pictures import SUFFIXES, crop, load_image

LONGEST = 128  # frames of a clip that training takes, its first


def find(folder, frames: int | None = None, without: Iterable = ()) -> tuple[list, bool]:
    """The pictures, or the clips, of a folder and below, but not below those in `without`; sorted,
    relative to it. -> paths, whether they are clips

    Clips are videos, animated pictures and, where frames > 1 says that clips are wanted, folders of
    numbered pictures. With frames = 1 all are pictures. Raises UserError where there are none, or
    both."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; --data wants a folder of images or clips", 2)
    outside = [pathlib.Path(w).resolve() for w in without]
    outside = {w for w in outside if folder.resolve() in w.parents}
    paths = set()
    for p in folder.rglob("*"):
        known = p.suffix.lower() in SUFFIXES | VIDEOS.keys()
        if known and p.is_file() and outside.isdisjoint(p.resolve().parents):
            paths.add(p.relative_to(folder))
    clips = {p for p in paths if p.suffix.lower() in VIDEOS}
    if frames != 1:
        clips |= {p for p in paths if animated(folder / p)}
    if frames is not None and frames > 1:
        numbered = {p for p in paths - clips if p.stem.isdigit() and p.parent.name}
        folders = {p.parent for p in numbered}
        paths, clips = paths - numbered | folders, clips | folders
    if not paths:
        kinds = f"({', '.join(sorted(SUFFIXES))}) and no clips ({', '.join(sorted(VIDEOS))})"
        raise UserError(f"{folder} holds no images {kinds}")
    if clips and clips != paths:
        raise UserError(
            f"{folder} mixes clips ({min(clips)}) and pictures ({min(paths - clips)}); keep them "
            "in folders of their own, or give --frames 1 to take animated pictures for still ones"
        )
    return sorted(paths), bool(clips)


def read_jsonl(path: pathlib.Path, fields: Iterable[str]) -> dict[str, dict]:
    """A JSON-lines file, absent or not, as {file_name: line}. Every line needs file_name and
    `fields`, all strings; raises UserError where one lacks them."""
    rows = {}
    text = path.read_text("utf-8-sig", errors="replace") if path.exists() else ""
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            missing = [f for f in ("file_name", *fields) if not isinstance(row.get(f), str)]
        except (ValueError, AttributeError):
            raise UserError(f"{path}, line {n}: is no JSON object")
        if missing:
            raise UserError(f"{path}, line {n}: the field '{missing[0]}' is missing or no string")
        rows[row["file_name"]] = row
    return rows


def caption_of(path: pathlib.Path, line: dict | None) -> str | None:
    """The caption of metadata.jsonl's line or, where there is none, of the .txt beside the file."""
    if line:
        return line["text"]
    note = path.with_suffix(".txt")
    return note.read_text("utf-8-sig", "replace").strip() if note.exists() else None


def report(folder, rows: list[dict], files: int, captioned: int, tuples: int) -> None:
    """Says on stderr what was found, and what was derived for the first three rows."""
    text = f"{files} images in {folder}, {captioned} captioned, {tuples} with full prompts"
    if len(rows) < files:
        text += f"; {files - len(rows)} left out: their caption already says what is asked for"
    print(text, file=sys.stderr)
    for row in {(r["src"], r["instr"]): r for r in rows[:3]}.values():
        for kind in ("src", "instr", "tgt", "undo"):
            print(f"  {kind:5} {row[kind]}", file=sys.stderr)


def load_rows(rows: list, size: tuple, frames: int = 1) -> Iterator[tuple[np.ndarray, dict]]:
    """Yields every row's picture (1, h, w, 3) or clip (F, h, w, 3) uint8, cropped to size (h, w),
    and the row; one at a time. What cannot be read is left out with a warning."""
    good = 0
    for row in rows:
        try:
            if frames == 1:
                pictures = [load_image(row["path"], size)]
            else:
                clip = itertools.islice(read_frames(row["path"]), LONGEST)
                pictures = [crop(picture, size) for picture, _ in clip]
            if len(pictures) < frames:
                few = f"{row['path']}: has {len(pictures)} frames, fewer than --frames {frames}"
                raise UserError(few)
        except UserError as error:
            print(f"warning: skipped {error}", file=sys.stderr)
            continue
        good += 1
        yield np.stack(pictures), row
    if not good:
        raise UserError(f"none of the {'images' if frames == 1 else 'clips'} could be read")


def is_numbered(folder: pathlib.Path) -> bool:
    """Whether a folder is one clip: nothing but numbered still pictures."""
    inside = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES | VIDEOS.keys()]
    for p in inside:
        if not p.stem.isdigit() or p.suffix.lower() in VIDEOS or animated(p):
            return False
    return bool(inside)


def jobs(source: pathlib.Path, output: str | None, frames: int, asked: int | None):
    """What --input asks for: one picture or clip, or all of a folder. frames: of a clip together,
    1 where the editor is one of pictures; asked: --frames itself. Raises UserError where --output
    is the input. -> target, [(file or folder of frames, its target), ...], whether they are clips
    """
    if output and pathlib.Path(output).resolve() == source.resolve():
        raise UserError(f"--output {output} would overwrite the input; choose another", 2)
    one_clip = source.is_dir() and frames > 1 and is_numbered(source)
    if source.is_dir() and not one_clip:
        target = pathlib.Path(output or "edited")
        as_clips = frames if frames > 1 or asked == 1 else None
        paths, clips = find(source, as_clips, [target])
        return target, [(source / path, target / path) for path in paths], clips
    clip = one_clip or source.suffix.lower() in VIDEOS or animated(source)
    default = f"edited{source.suffix}" if clip else "edited.png"
    target = pathlib.Path(output or default)
    return target, [(source, target)], clip


def free_name(where: pathlib.Path, written: set) -> pathlib.Path:
    """a.jpg becomes a.png; an a.png beside it a.png.png."""
    name = where.with_suffix(".png")
    return name if name not in written else where.with_name(f"{where.name}.png")
