"""Clips: videos, animated pictures and folders of numbered pictures, read and written by frame.

A frame is a pair (picture (h, w, 3) uint8, seconds from the beginning). Clips are iterables of
frames, so that one of any length passes through the memory of a few.
"""

import contextlib
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction

import numpy as np
from PIL import Image

from files.disk import UserError, replacing, why
from files.pictures import BROKEN, SUFFIXES, contact_sheet, crop, load_image, upright, write_image

RATE = 8  # frames a second, where the clip itself does not say
VIDEOS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}  # FFmpeg's names


def animated(path: pathlib.Path) -> bool:
    """Whether a picture file holds several frames."""
    if path.suffix.lower() in (".gif", ".webp", ".png"):
        with contextlib.suppress(*BROKEN), Image.open(path) as img:
            return getattr(img, "n_frames", 1) > 1
    return False


def with_av(path):
    """PyAV, which only videos need. Raises UserError where it is not installed."""
    try:
        import av

        return av
    except ImportError:
        raise UserError(
            f"{path}: videos need PyAV: pip install av; "
            "or use an animated WebP or GIF, or a folder of numbered pictures"
        )


def read_frames(path: pathlib.Path) -> Iterator[tuple[np.ndarray, float]]:
    """Yields a clip's frames, one at a time. Numbered pictures count as eight a second.

    Raises UserError where the clip cannot be read, possibly after the first frames.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        yield from read_numbered(path)
    elif path.suffix.lower() in VIDEOS:
        yield from read_video(path)
    else:
        yield from read_animation(path)


def read_numbered(folder):
    """The frames in a folder of pictures whose names are numbers."""
    pictures = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES]
    numbered = [p for p in pictures if p.stem.isdigit()]
    for i, path in enumerate(sorted(numbered, key=lambda p: int(p.stem))):
        yield load_image(path), i / RATE


def read_video(path):
    """The frames of a video, upright."""
    av = with_av(path)
    first = None
    try:
        with av.open(str(path)) as file:
            for frame in file.decode(video=0):
                if first is None:
                    first = frame.time
                picture = frame.to_ndarray(format="rgb24")
                yield np.rot90(picture, frame.rotation // 90), frame.time - first
    except (av.error.FFmpegError, IndexError, TypeError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a video ({why(error)})")
    if first is None:
        raise UserError(f"{path}: cannot be read as a video (it has no frames)")


def read_animation(path):
    """The frames of an animated picture; a still one has a single frame."""
    milliseconds = 0
    try:
        with Image.open(path) as img:
            for i in range(getattr(img, "n_frames", 1)):
                img.seek(i)
                img.load()  # before this a WebP does not know the frame's duration
                yield upright(img), milliseconds / 1000
                milliseconds += img.info.get("duration") or 100
    except BROKEN as error:
        raise UserError(f"{path}: cannot be read as an animated picture ({why(error)})")


def write_clip(
    path: str | pathlib.Path,
    frames: Iterable[tuple[np.ndarray, float]],
    like: pathlib.Path | None = None,
) -> None:
    """Writes frames, at least one, as read_frames yields them. The suffix chooses the format.

    Without a suffix path is a folder of numbered pictures. A video takes the rate and the sound of
    the video `like`; it is written frame by frame. Raises UserError where path cannot be written.
    """
    path = pathlib.Path(path)
    if not path.suffix:
        for i, (picture, _) in enumerate(frames):
            write_image(path / f"{i:05d}.png", picture)
    elif path.suffix.lower() in VIDEOS:
        write_video(path, frames, like)
    else:
        write_animation(path, frames)


def write_video(path, frames, like):
    """Opens the files of a video, and of the one it is like, for `encode`."""
    av = with_av(path)
    with replacing(path) as tmp, contextlib.ExitStack() as stack:
        try:
            container = VIDEOS[path.suffix.lower()]
            file = stack.enter_context(av.open(str(tmp), "w", format=container))
            source = None
            if like and pathlib.Path(like).suffix.lower() in VIDEOS:
                source = stack.enter_context(av.open(str(like)))
            encode(file, frames, source)
        except (av.error.FFmpegError, IndexError, ValueError) as error:
            raise OSError(why(error))  # `replacing` cleans up and reports it


def encode(file, frames, source):
    """Writes frames to an open video; rate, unit of time and sound are those of source, if any."""
    import av  # with_av has found it

    unit, rate, sound = Fraction(1, 1000), RATE, None
    if source is not None:
        unit = source.streams.video[0].time_base
        rate = source.streams.video[0].average_rate
        sound = next(iter(source.streams.audio), None)

    # a file has all its streams before the first packet
    codec = "libvpx-vp9" if file.format.name == "webm" else "libx264"
    stream = file.add_stream(codec, rate=rate)
    if sound is not None:
        copy = file.add_stream_from_template(sound)

    for i, (picture, seconds) in enumerate(frames):
        if i == 0:
            set_size(stream, *picture.shape[:2])
            stream.codec_context.time_base = unit
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
        frame.pts = round(seconds / unit)
        frame.time_base = unit
        file.mux(stream.encode(frame))
    file.mux(stream.encode())  # what the codec still holds back

    if sound is not None:
        for packet in source.demux(sound):
            if packet.dts is not None:  # not the empty packet at the end
                packet.stream = copy
                file.mux(packet)


def set_size(stream, height, width):
    """Size and pixel format of a new video stream, in pixels."""
    stream.height, stream.width = height, width
    odd = height % 2 or width % 2
    stream.pix_fmt = "yuv444p" if odd else "yuv420p"  # 4:2:0 has even sizes only


def write_animation(path, frames):
    """Writes an animated WebP, GIF or PNG."""
    pictures, times = [], []
    for picture, seconds in frames:
        pictures.append(Image.fromarray(picture))
        times.append(seconds)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in ("WEBP", "GIF", "PNG"):
        raise UserError(
            f"{path}: no clip can be written under this name; "
            "end it in .mp4, .mov, .mkv, .webm, .webp, .gif or .png",
            2,
        )
    options = {"duration": durations(times, kind), "loop": 0}  # 0: for ever
    if kind == "WEBP":
        options |= {"quality": 90, "method": 4}
    with replacing(path) as tmp:
        pictures[0].save(tmp, kind, save_all=True, append_images=pictures[1:], **options)


def durations(times, kind):
    """times, in seconds from the beginning -> milliseconds that each picture lasts.

    The last one lasts as long as the one before it. Moments are rounded, not differences, so that
    nothing drifts.
    """
    unit = 10 if kind == "GIF" else 1  # milliseconds; GIF counts in hundredths of a second
    ticks = [round(1000 * seconds / unit) for seconds in times]
    lasts = [unit * (end - start) for start, end in itertools.pairwise(ticks)]
    if not lasts:
        lasts = [1000 // RATE]
    return [*lasts, lasts[-1]]


def write_sheets(path: pathlib.Path, columns: list, frames: int) -> np.ndarray:
    """Writes a contact_sheet of pictures or, for clips, an animated one.

    columns: as contact_sheet takes them, but every `frames` pictures of a column are a clip.
    -> the middle frame's sheet (H, W, 3) uint8
    """
    sheets = []
    for i in range(frames):
        sheet = contact_sheet([column[i::frames] for column in columns])
        sheets.append(np.asarray(sheet))
    if frames > 1:
        write_clip(path, [(sheet, i / RATE) for i, sheet in enumerate(sheets)])
    else:
        write_image(path, sheets[0])
    return sheets[frames // 2]


def windows(frames: Iterable, length: int, change: Callable) -> Iterator[tuple[np.ndarray, float]]:
    """Edits a clip of any length in the memory of one window; yields the edited frames.

    change: edits a list of at most `length` pictures -> list of (h, w, 3) float in [0, 255].
    Windows overlap by a quarter, where one is blended into the next.
    """
    held = []  # the frames of this window
    tail = []  # edits of the first of them, by the window before
    for frame in itertools.chain(frames, [None]):
        last = frame is None
        if not last:
            held.append(frame)
            if len(held) < length:
                continue
        if len(held) > len(tail):
            edits = change([picture for picture, _ in held])
        else:  # the clip ends where the window before ended
            edits = tail
        blend(edits, tail)
        overlap = 0 if last else length // 4
        done = len(held) - overlap
        for picture, (_, seconds) in zip(edits[:done], held):
            yield (picture + 0.5).astype(np.uint8), seconds
        held, tail = held[done:], edits[done:]


def blend(edits, tail):
    """Moves the first edits of a window, in place, from those of the window before to its own."""
    for i, before in enumerate(tail):
        edits[i] = before + (edits[i] - before) * (i + 1) / (len(tail) + 1)


def edit_clip(path, target: pathlib.Path, length: int, size_of: Callable, change: Callable) -> None:
    """Edits the clip at `path` window by window, at the size (h, w) that size_of says of a frame,
    into `target`, at its own size. change: some frames (F, h, w, 3) -> edited (F, h, w, 3) uint8.
    Writes a sheet of the first window beside it."""
    first = []

    def at_full_size(pictures):
        small = [crop(picture, size_of(picture)) for picture in pictures]
        edited = change(small)
        if not first:
            first.extend((small, edited))
        full = pictures[0].shape[1::-1]
        images = [Image.fromarray(y).resize(full, Image.Resampling.LANCZOS) for y in edited]
        return [np.asarray(image, np.float32) for image in images]

    write_clip(target, windows(read_frames(path), length, at_full_size), like=path)
    write_image(target.with_name(target.stem[:50] + ".sheet.png"), contact_sheet(first))
