"""Pictures of any kind: read upright in RGB, cropped, written, laid out on sheets.

A picture is an array (H, W, 3) of uint8.
"""

import pathlib
import struct
import warnings

import numpy as np
from PIL import Image, ImageOps

from files.disk import UserError, replacing, why

HEIC = {".heic", ".heif"}  # what iPhones write; Pillow reads it by pillow-heif
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"} | HEIC

# what Pillow raises on a damaged file
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
)

# EXIF's orientations, and the turn that undoes each; 1 is upright
ORIENTATION = 0x112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def crop(
    picture: np.ndarray,
    size: tuple[int, int],
    zoom: float = 1.0,
    at: tuple[float, float] = (0.5, 0.5),
    mirrored: bool = False,
) -> np.ndarray:
    """Crops a picture to the aspect of size, then resizes it with antialiasing.

    picture (H, W, 3) uint8; size (h, w). The crop is `zoom` times the largest possible.
    `at` (x, y) places it: 0 is left or top, 1 is right or bottom. -> (h, w, 3) uint8
    """
    img = Image.fromarray(picture)
    largest = min(img.height / size[0], img.width / size[1])
    h = size[0] * zoom * largest
    w = size[1] * zoom * largest
    # h and w may exceed the picture by a rounding
    top = max(0, (img.height - h) * at[1])
    left = max(0, (img.width - w) * at[0])
    box = (left, top, min(left + w, img.width), min(top + h, img.height))
    img = img.resize(size[::-1], Image.Resampling.LANCZOS, box=box)
    if mirrored:
        img = ImageOps.mirror(img)
    return np.asarray(img)


def pad(picture: np.ndarray, unit: int) -> np.ndarray:
    """A picture (h, w, 3) made up to multiples of `unit`, below and on the right, by its border."""
    h, w = picture.shape[:2]
    return np.pad(picture, ((0, -h % unit), (0, -w % unit), (0, 0)), "edge")


def white(values: np.ndarray) -> int:
    """The value that is white in greyscale of 16 bit (65535), of 8 bit (255) or in [0, 1]."""
    if values.max() > 255:
        return 65535
    if values.max() > 1:
        return 255
    return 1


def to_eight_bits(img: Image.Image) -> Image.Image:
    """Integer or float greyscale -> 8 bit."""
    values = np.asarray(img, np.float32)
    scaled = values / white(values) * 255
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8))


def upright(img: Image.Image) -> Image.Image:
    """A PIL image as it is meant to be seen. -> (h, w, 3) uint8

    EXIF's turn is done, transparency is laid on white, 16 bit and float greyscale are scaled.
    """
    img.load()  # a TIFF turns itself here
    # ImageOps.exif_transpose would write EXIF anew, and stumbles over an odd tag
    turn = TURNS.get(img.getexif().get(ORIENTATION))
    if turn is not None:
        img = img.transpose(turn)
    if img.mode.startswith(("I", "F")):
        img = to_eight_bits(img)
    if img.mode in ("P", "PA", "LA", "La", "RGBa") or "transparency" in img.info:
        img = img.convert("RGBA")
    if img.mode == "RGBA":
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
    return np.asarray(img.convert("RGB"))


def reads_heic() -> bool:
    """Whether pillow-heif is installed, which then lets Pillow read HEIC."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def load_image(path: pathlib.Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """One picture; with size (h, w) the largest centred `crop`. -> (h, w, 3) uint8

    Raises UserError where it cannot be read.
    """
    if path.suffix.lower() in HEIC and not reads_heic():
        raise UserError(f"{path}: HEIC needs pillow-heif: pip install pillow-heif, or convert it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = upright(Image.open(path))
    except BROKEN as error:
        raise UserError(f"{path}: cannot be read as an image ({why(error)})")
    if size is None:
        return picture
    return crop(picture, size)


def format_of(path: pathlib.Path) -> str:
    """Pillow's format of a suffix. Raises UserError where it has none to write."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(
            f"{path}: no picture can be written under this name; end it in .png, .jpg or .webp", 2
        )
    return kind


def write_image(path: str | pathlib.Path, picture: np.ndarray | Image.Image) -> None:
    """picture: (h, w, 3) uint8 or a PIL image; the suffix chooses the format.

    Raises UserError where Pillow has no format for the suffix, or the file cannot be written.
    """
    path = pathlib.Path(path)
    kind = format_of(path)
    with replacing(path) as tmp:
        if not isinstance(picture, Image.Image):
            picture = Image.fromarray(picture)
        picture.save(tmp, kind)


def contact_sheet(columns: list[list[np.ndarray]], gap: int = 4) -> Image.Image:
    """Pictures side by side, a row for each source. Small sheets are enlarged to see the pixels.

    columns: lists of (h, w, 3) uint8, e.g. sources, edits, edits undone. gap: pixels of white.
    """
    border = ((gap, gap), (gap, gap), (0, 0))
    rows = []
    for row in zip(*columns):
        framed = [np.pad(picture, border, constant_values=255) for picture in row]
        rows.append(np.concatenate(framed, 1))  # (h + 2 gap, columns * (w + 2 gap), 3)
    sheet = Image.fromarray(np.concatenate(rows, 0))
    zoom = max(1, 512 // sheet.width)
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)
