"""Clips: videos, animated pictures and folders of numbered pictures, read and written frame by frame."""

import contextlib
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction

import numpy as np
from PIL import Image

from files.disk import UserError, replacing, why
from files.pictures import BROKEN, SUFFIXES, contact_sheet, load_image, upright, write_image

VIDEOS = {
    ".mp4": "mp4",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "webm",
}  # suffix: what FFmpeg calls it


def animated(path: pathlib.Path) -> bool:
    """Whether a picture file holds several frames."""
    if path.suffix.lower() in (".gif", ".webp", ".png"):
        with contextlib.suppress(*BROKEN), Image.open(path) as img:
            return getattr(img, "n_frames", 1) > 1
    return False


def with_av(path):
    """PyAV, which only videos need."""
    try:
        import av

        return av
    except ImportError:
        raise UserError(
            f"{path}: videos need PyAV: pip install av; or use an animated WebP or GIF, or a folder of numbered pictures"
        )


def read_frames(path: pathlib.Path) -> Iterator[tuple[np.ndarray, float]]:
    """Yields a clip's frames, one at a time, as (picture (h, w, 3) uint8, seconds from the beginning). Numbered pictures: eight a second.
    Raises UserError where it cannot be read, also after some frames."""
    path = pathlib.Path(path)
    if path.is_dir():
        for i, p in enumerate(
            sorted(
                (p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.stem.isdigit()),
                key=lambda p: int(p.stem),
            )
        ):
            yield load_image(p), i / 8
    elif path.suffix.lower() in VIDEOS:
        av, first = with_av(path), None
        try:
            with av.open(str(path)) as file:
                for frame in file.decode(video=0):
                    first = frame.time if first is None else first
                    yield (
                        np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90),
                        frame.time - first,
                    )
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
                    img.load()  # a WebP tells the duration only now
                    yield upright(img), now / 1000
                    now += img.info.get("duration") or 100
        except BROKEN as error:
            raise UserError(f"{path}: cannot be read as an animated picture ({why(error)})")


def write_clip(
    path: str | pathlib.Path,
    frames: Iterable[tuple[np.ndarray, float]],
    like: pathlib.Path | None = None,
) -> None:
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
                file = stack.enter_context(
                    av.open(str(tmp), "w", format=VIDEOS[path.suffix.lower()])
                )
                source = (
                    stack.enter_context(av.open(str(like)))
                    if like and pathlib.Path(like).suffix.lower() in VIDEOS
                    else None
                )
                base = source.streams.video[0].time_base if source else Fraction(1, 1000)
                rate = source.streams.video[0].average_rate if source else 8
                stream = file.add_stream(
                    "libvpx-vp9" if path.suffix.lower() == ".webm" else "libx264", rate=rate
                )
                sound = source.streams.audio[0] if source and source.streams.audio else None
                copy = file.add_stream_from_template(sound) if sound else None
                for i, (picture, seconds) in enumerate(frames):
                    if i == 0:
                        (stream.height, stream.width), stream.codec_context.time_base = (
                            picture.shape[:2],
                            base,
                        )
                        stream.pix_fmt = (
                            "yuv444p" if stream.height % 2 or stream.width % 2 else "yuv420p"
                        )  # 420 has even sizes only
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
                    frame.pts, frame.time_base = round(seconds / base), base
                    file.mux(stream.encode(frame))
                file.mux(stream.encode())
                for packet in source.demux(sound) if sound else ():
                    if packet.dts is not None:
                        packet.stream = copy
                        file.mux(packet)
            except (av.error.FFmpegError, IndexError, ValueError) as error:
                raise OSError(why(error))  # `replacing` cleans up and says it
    else:
        pictures, times = zip(*((Image.fromarray(p), s) for p, s in frames))
        if (kind := Image.registered_extensions().get(path.suffix.lower())) not in (
            "WEBP",
            "GIF",
            "PNG",
        ):
            raise UserError(
                f"{path}: no clip can be written under this name; end it in .mp4, .mov, .mkv, .webm, .webp, .gif or .png",
                2,
            )
        unit = 10 if kind == "GIF" else 1  # milliseconds; rounded in sum, so that nothing drifts
        lasts = [
            unit * (round(1000 * b / unit) - round(1000 * a / unit))
            for a, b in zip(times, times[1:])
        ] or [125]
        with replacing(path) as tmp:
            pictures[0].save(
                tmp,
                kind,
                save_all=True,
                append_images=pictures[1:],
                duration=[*lasts, lasts[-1]],
                loop=0,
                **{"quality": 90, "method": 4} if kind == "WEBP" else {},
            )


def write_sheets(path: pathlib.Path, columns: list, frames: int) -> np.ndarray:
    """contact_sheet as a picture or, where every `frames` pictures of a column are a clip, as an animated one. -> the middle frame's sheet"""
    sheets = [
        np.asarray(contact_sheet([column[i::frames] for column in columns])) for i in range(frames)
    ]
    if frames > 1:
        write_clip(path, [(sheet, i / 8) for i, sheet in enumerate(sheets)])
    else:
        write_image(path, sheets[0])
    return sheets[frames // 2]


def windows(frames: Iterable, length: int, change: Callable) -> Iterator[tuple[np.ndarray, float]]:
    """Edits a clip of any length in the memory of one window: change(list of at most `length` pictures) -> list of (h, w, 3) float.
    Windows overlap by a quarter, where one is blended into the next. frames: (picture, seconds) ... -> (edited picture, seconds) ..."""
    held, tail = [], []  # the tail: edits of the first frames in held, by the window before
    for frame in itertools.chain(frames, [None]):
        held += [frame] * (frame is not None)
        if len(held) == length or frame is None and held:
            y = change([picture for picture, _ in held]) if len(held) > len(tail) else tail
            for i, old in enumerate(tail):
                y[i] = old + (y[i] - old) * (i + 1) / (len(tail) + 1)
            done = len(held) - (length // 4 if frame is not None else 0)
            for picture, (_, seconds) in zip(y[:done], held):
                yield (picture + 0.5).astype(np.uint8), seconds
            held, tail = held[done:], y[done:]
