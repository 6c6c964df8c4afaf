"""Pictures of any kind: read upright in RGB, cropped, written, laid out on sheets."""

import pathlib
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps

from files.disk import UserError, replacing

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}


BROKEN = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    EOFError,
    LookupError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # Pillow's complaints


TURNS = dict(
    enumerate(
        "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split(),
        2,
    )
)  # EXIF's orientations


def crop(
    picture: np.ndarray,
    size: tuple[int, int],
    zoom: float = 1.0,
    at: tuple[float, float] = (0.5, 0.5),
    mirrored: bool = False,
) -> np.ndarray:
    """picture (H, W, 3) uint8, cropped to the aspect of size (h, w) and resized with antialiasing; the crop is `zoom` times the
    largest possible, `at` places it (0: left or top, 1: right or bottom). -> (h, w, 3) uint8"""
    img = Image.fromarray(picture)
    h, w = (s * zoom * min(img.height / size[0], img.width / size[1]) for s in size)
    top, left = (
        max(0, (img.height - h) * at[1]),
        max(0, (img.width - w) * at[0]),
    )  # h may exceed by a rounding
    img = img.resize(
        size[::-1],
        Image.Resampling.LANCZOS,
        box=(left, top, min(left + w, img.width), min(top + h, img.height)),
    )
    return np.asarray(ImageOps.mirror(img) if mirrored else img)


def upright(img: Image.Image) -> Image.Image:
    """A PIL image as it is to be seen: EXIF's turn done, transparent on white, 16 bit and float greyscale scaled. -> (h, w, 3) uint8"""
    img.load()  # a TIFF turns itself here
    if turn := TURNS.get(
        img.getexif().get(0x112)
    ):  # ImageOps.exif_transpose writes EXIF anew, and stumbles over an odd tag
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


def write_image(path: str | pathlib.Path, picture: np.ndarray | Image.Image) -> None:
    """picture (h, w, 3) uint8 or a PIL image; the suffix says the format."""
    path = pathlib.Path(path)
    if (kind := Image.registered_extensions().get(path.suffix.lower())) not in Image.SAVE:
        raise UserError(
            f"{path}: no picture can be written under this name; end it in .png, .jpg or .webp", 2
        )
    with replacing(path) as tmp:
        (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(tmp, kind)


def contact_sheet(columns: list[list[np.ndarray]], gap: int = 4) -> Image.Image:
    """columns: lists of (h, w, 3) uint8, e.g. sources, edits, edits undone -> one picture, a row for each source."""
    rows = [
        np.concatenate(
            [np.pad(p, ((gap, gap), (gap, gap), (0, 0)), constant_values=255) for p in row], 1
        )
        for row in zip(*columns)
    ]
    page = Image.fromarray(np.concatenate(rows, 0))
    zoom = max(1, 512 // page.width)
    return page.resize((page.width * zoom, page.height * zoom), Image.Resampling.NEAREST)
