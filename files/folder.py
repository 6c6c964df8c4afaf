"""What a folder holds: pictures or clips, and the lines of a .jsonl file beside them."""

import itertools
import json
import os
import pathlib
import sys
import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np

from files.clips import VIDEOS, animated, read_frames
from files.disk import UserError, note
from files.pictures import HEIC, SUFFIXES, crop, format_of, load_image, reads_heic

LONGEST = 128  # frames of a clip that training takes, its first
NO_CAPTION = (
    "no picture in {} has a caption: write one for each, in metadata.jsonl "
    '({{"file_name": "a.jpg", "text": "a farm in autumn"}}) or in a.txt beside a.jpg, or give one '
    'for all, --src "a photograph of a farm in summer"'
)


def find(folder, frames: int | None = None, without: Iterable = ()) -> tuple[list, bool]:
    """The pictures, or the clips, of a folder and below, but not below those in `without`; sorted,
    relative to it. -> paths, whether they are clips

    Clips are videos, animated pictures and, where frames > 1 says that clips are wanted, folders of
    numbered pictures. With frames = 1 no picture is one. Of a folder of both the pictures are taken
    or, where clips are wanted, the clips; the others are left out with a warning. Raises UserError
    where there are none."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; --data wants a folder of images or clips", 2)
    outside = [pathlib.Path(w).resolve() for w in without]
    outside = {w for w in outside if folder.resolve() in w.parents}
    paths = set()
    for p in folder.rglob("*"):
        known = p.suffix.lower() in SUFFIXES | VIDEOS.keys() and not p.name.startswith(".")
        if known and p.is_file() and outside.isdisjoint(p.resolve().parents):
            paths.add(p.relative_to(folder))
    clips = {p for p in paths if p.suffix.lower() in VIDEOS}
    if frames != 1:
        clips |= {p for p in paths if animated(folder / p)}
    if frames is not None and frames > 1:
        numbered = {p for p in paths - clips if p.stem.isdigit() and p.parent.name}
        folders = {p.parent for p in numbered}
        paths, clips = paths - numbered | folders, clips | folders
    closed = {p for p in paths if p.suffix.lower() in HEIC and not reads_heic()}
    leave_out(closed, "HEIC pictures", "`pip install pillow-heif` reads them")
    paths -= closed
    pictures = paths - clips
    if not paths:
        kinds = f"({', '.join(sorted(SUFFIXES))}) and no clips ({', '.join(sorted(VIDEOS))})"
        raise UserError(f"{folder} holds no images that can be read {kinds}")
    if clips and frames is not None and frames > 1:
        leave_out(pictures, "pictures", "the clips beside them are taken")
        return sorted(clips), True
    if pictures:
        leave_out(clips, "clips", "the pictures beside them are taken; --frames 8 takes the clips")
        return sorted(pictures), False
    return sorted(clips), True


def leave_out(paths: set, kind: str, instead: str) -> None:
    """Warns of files that are not used."""
    if paths:
        print(
            f"warning: {kind} left out: {len(paths)} ({min(paths)}); {instead}",
            file=sys.stderr,
        )


def lines_of(folder: pathlib.Path, lines: dict[str, dict], paths: list) -> dict[str, dict]:
    """The lines of a .jsonl file that are of `paths`, without those of what `find` left out. Raises
    UserError where one names anything else."""
    used = {name_of(p) for p in paths}
    clips_used = all(is_clip(folder / p) for p in paths)
    for name in sorted(lines.keys() - used):
        path = folder / name
        if not os.path.isfile(path) or not is_other(path, clips_used):  # bears any name
            raise UserError(
                f"{folder}: a .jsonl file names '{one_line(name)}', which is no image of this "
                "folder; correct or remove the line"
            )
    return {name: line for name, line in lines.items() if name in used}


def is_clip(path: pathlib.Path) -> bool:
    return path.is_dir() or path.suffix.lower() in VIDEOS or animated(path)


def is_other(path: pathlib.Path, clips_used: bool) -> bool:
    """Whether a file is of the kind that is left out: a picture among clips, or the reverse, or
    HEIC."""
    kind = path.suffix.lower()
    return kind in HEIC or is_clip(path) != clips_used and kind in SUFFIXES | VIDEOS.keys()


def name_of(path) -> str:
    """A file's name as .jsonl files have it: relative, without "./", in one Unicode form (Mac
    systems write umlauts in another)."""
    return unicodedata.normalize("NFC", pathlib.PurePath(path).as_posix())


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
        name = name_of(row["file_name"])
        if name in rows:
            raise UserError(f"{path}, line {n}: '{one_line(name)}' has a line already; keep one")
        rows[name] = row
    return rows


def caption_of(path: pathlib.Path, line: dict | None) -> str | None:
    """The caption of metadata.jsonl's line or, where there is none, of the .txt beside the file."""
    if line:
        return line["text"]
    note = path.with_suffix(".txt")
    return note.read_text("utf-8-sig", "replace").strip() or None if note.exists() else None


def one_line(text: str, width: int = 90) -> str:
    """A text of the user's, to print it."""
    text = " ".join(text[: 9 * width].split())
    return text if len(text) <= width else text[: width - 1] + "…"


def report(folder, rows: list[dict], files: int, captioned: int, tuples: int, src) -> None:
    """Says on stderr what was found, and what was derived for the first three rows. src: the one
    caption of all, or None"""
    text = f"{files} images in {folder}, {captioned} captioned, {tuples} with full prompts"
    if len(rows) < files:
        text += f"; {files - len(rows)} left out: their caption already says what is asked for"
    print(text, file=sys.stderr)
    for row in {(r["src"], r["instr"]): r for r in rows[:3]}.values():
        for kind in ("src", "instr", "tgt", "undo"):
            print(f"  {kind:5} {one_line(row[kind])}", file=sys.stderr)
    if src:
        note("one caption for all: remove pictures that already show the edit yourself")
    elif bare := files - captioned - tuples:
        print(f'warning: {bare} without a caption count as "a picture"', file=sys.stderr)


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
    if not clip:
        format_of(target)  # before anything is loaded
    return target, [(source, target)], clip


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
    """The file of a row, or the files in its folder of numbered pictures."""
    return [file for file in (path, *path.glob("*")) if file.is_file()]


def free_name(where: pathlib.Path, written: set) -> pathlib.Path:
    """a.jpg becomes a.png; an a.png beside it a.png.png."""
    name = where.with_suffix(".png")
    return name if name not in written else where.with_name(f"{where.name}.png")
