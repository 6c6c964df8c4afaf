"""The embedded world: 64 x 64 landscapes drawn from an explicit record, so that every edit has an
exact truth.

    python tiny/scenes.py sheet.png                                # one page of the whole world
    python tiny/scenes.py tiny/examples --n 256 --seed 1           # unpaired pictures with captions
    python tiny/scenes.py tiny/clips --n 96 --seed 2 --frames 12   # of clips, eight frames a second

A `Scene` is attributes (what captions and edits talk about: season, time, weather, house, style)
plus geometry (everything else). `render` draws it, `dataclasses.replace(scene, season="winter")` is
its exact counterfactual, `tau` moves it through time, and `judge` reads attributes back: of all
attribute combinations drawn for that very geometry, which is nearest? Training code never calls
`render` on a counterfactual; only the benchmark does.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib

import numpy as np
from PIL import Image, ImageDraw

SIZE, SCALE = 64, 4  # pixels of a picture; supersampling of the drawing (anti-aliasing)
ATTRIBUTES = {
    "season": ("spring", "summer", "autumn", "winter"),
    "time": ("day", "sunset", "night"),
    "weather": ("clear", "fog", "rain", "snowfall"),
    "house": ("red", "blue", "yellow", "white", "purple"),
    "style": ("plain", "sketch", "pixel", "blueprint"),
}
# How often a value occurs in the world where values are not equally likely.
WEIGHTS = {"weather": (0.58, 0.14, 0.14, 0.14), "style": (0.64, 0.12, 0.12, 0.12)}
KINDS = ("pine", "round", "poplar")

# ground, far hills, foliage of round trees, of poplars, of pines, roof
SEASON = {
    "spring": (
        (158, 212, 96),
        (190, 222, 140),
        (244, 166, 198),
        (188, 220, 110),
        (72, 146, 84),
        (150, 84, 62),
    ),
    "summer": (
        (74, 156, 62),
        (112, 180, 100),
        (38, 122, 50),
        (84, 152, 44),
        (24, 98, 60),
        (150, 84, 62),
    ),
    "autumn": (
        (208, 164, 84),
        (192, 140, 96),
        (222, 104, 36),
        (236, 180, 46),
        (70, 108, 62),
        (150, 84, 62),
    ),
    "winter": (
        (240, 244, 250),
        (212, 224, 238),
        (222, 230, 240),
        (204, 216, 230),
        (96, 138, 128),
        (250, 252, 255),
    ),
}
TRUNK = (104, 74, 52)
HOUSE = {
    "red": (206, 48, 44),
    "blue": (56, 100, 208),
    "yellow": (246, 204, 56),
    "white": (244, 240, 230),
    "purple": (146, 76, 178),
}
SKY = {  # top, horizon
    "day": ((92, 164, 232), (204, 232, 250)),
    "sunset": ((122, 84, 150), (255, 170, 98)),
    "night": ((10, 14, 46), (44, 56, 110)),
}
# multiplies every lit surface
LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.78, 0.66), "night": (0.36, 0.40, 0.60)}
# sun, setting sun, moon
DISC = {"day": (255, 236, 130), "sunset": (255, 118, 60), "night": (240, 240, 220)}
FOG = {"day": (0.86, 0.88, 0.90), "sunset": (0.88, 0.74, 0.66), "night": (0.28, 0.31, 0.40)}


@dataclasses.dataclass(frozen=True)
class Scene:
    season: str
    time: str
    weather: str
    house: str
    style: str
    place: tuple  # house: left edge, base line, width, wall height
    kind: str  # of all trees of a scene
    trees: tuple  # of (x, base line, height)
    hills: tuple  # phase and height of the far hills, phase and height of the near ground
    disc: tuple  # x, y of sun or moon
    clouds: tuple  # of (x, y, width)
    bird: tuple  # () or (x, y)
    phase: tuple  # where the pattern of rain, snow and stars begins


def sample_scene(rng: np.random.Generator, **fixed) -> Scene:
    """A random Scene from a numpy Generator; keyword arguments fix attributes or geometry."""

    def u(low, high):
        return round(float(rng.uniform(low, high)), 2)

    values = {k: str(rng.choice(v, p=WEIGHTS.get(k))) for k, v in ATTRIBUTES.items()}
    width = u(17, 23)
    left = u(4, 60 - width)
    place = (left, u(48, 54), width, u(10, 13))
    slots = [x for x in (5, 13, 21, 29, 37, 45, 53, 60) if not left - 4 < x < left + width + 4]
    count = int(rng.integers(0, min(4, len(slots)) + 1))
    xs = sorted(rng.choice(slots, count, replace=False))
    trees = tuple((u(x - 1.5, x + 1.5), u(45, 57), u(15, 22)) for x in xs)
    clouds = tuple((u(4, 60), u(6, 17), u(11, 18)) for _ in range(rng.integers(0, 3)))
    scene = Scene(
        **values,
        place=place,
        kind=str(rng.choice(KINDS)),
        trees=trees,
        hills=(u(0, 6.28), u(25, 31), u(0, 6.28), u(38, 42)),
        disc=(u(8, 56), u(8, 15)),
        clouds=clouds,
        bird=(u(8, 56), u(10, 24)) if rng.random() < 0.25 else (),
        phase=(u(0, 16), u(0, 16)),
    )
    return dataclasses.replace(scene, **fixed)


def _lit(colour, light):
    return tuple(int(c * f) for c, f in zip(colour, light))


def _points(points):
    """In pixels of the supersampled drawing, as Pillow takes a polygon."""
    return [(x * SCALE, y * SCALE) for x, y in points]


def _box(x0, y0, x1, y1):
    """The same of a rectangle or an ellipse."""
    return [x0 * SCALE, y0 * SCALE, x1 * SCALE - 1, y1 * SCALE - 1]


def _ridge(phase, height, wave):
    x = np.arange(-4, 69, 2.0)
    y = height + 2.6 * np.sin(x / wave + phase) + 1.2 * np.sin(x / wave * 2.3 + 2 * phase)
    return list(zip(x, y)) + [(68, 68), (-4, 68)]


def _sky(scene, time, tau):
    """The sky with its stars, sun or moon. -> image, what draws on it"""
    n = SIZE * SCALE
    fade = np.clip(np.arange(n)[:, None, None] / (0.62 * n), 0, 1)
    top, low = np.array(SKY[time])
    sky = np.broadcast_to(top + (low - top) * fade, (n, n, 3)).astype(np.uint8)
    img = Image.fromarray(np.ascontiguousarray(sky))
    draw = ImageDraw.Draw(img)
    if time == "night":
        for i in range(9):
            x = (i * 23.7 + 4 * scene.phase[0]) % 62 + 1
            y = (i * 9.1 + scene.phase[1]) % 24 + 1
            draw.ellipse(_box(x - 0.6, y - 0.6, x + 0.6, y + 0.6), fill=(236, 236, 210))
    x, y = (scene.disc[0] + 6 * tau) % 68, scene.disc[1] + (9 if time == "sunset" else 0)
    r = {"day": 4.6, "sunset": 6.2, "night": 4.0}[time]
    draw.ellipse(_box(x - r, y - r, x + r, y + r), fill=DISC[time])
    return img, draw


def _draw(scene, season, time, house, tau):
    """The clear, plain picture. -> (64, 64, 3) float in [0, 1]"""
    light, (ground, far, round_, poplar, pine, roof) = LIGHT[time], SEASON[season]
    img, draw = _sky(scene, time, tau)

    def poly(points, colour):
        draw.polygon(_points(points), fill=_lit(colour, light))

    def rect(*sides, colour):
        draw.rectangle(_box(*sides), fill=_lit(colour, light))

    def oval(*sides, colour):
        draw.ellipse(_box(*sides), fill=_lit(colour, light))

    for x, y, w in scene.clouds:
        x = (x + 14 * tau + 12) % 88 - 12
        for dx, dy, f in ((-0.28, 0.06, 0.5), (0.28, 0.06, 0.5), (0, -0.06, 0.62)):
            left, right = x + w * (dx - f / 2), x + w * (dx + f / 2)
            top, low = y + w * (dy - f / 3.4), y + w * (dy + f / 3.4)
            oval(left, top, right, low, colour=(250, 250, 252))
    poly(_ridge(scene.hills[0], scene.hills[1], 11.0), far)
    poly(_ridge(scene.hills[2], scene.hills[3], 17.0), ground)

    def tree(x, y, h):
        if scene.kind == "pine":
            rect(x - 0.9, y - 4, x + 0.9, y, colour=TRUNK)
            for k in range(3):
                w, b = h * (0.30 - 0.065 * k), y - 2.5 - h * 0.24 * k
                poly([(x - w, b), (x + w, b), (x, b - h * 0.46)], pine)
                if season == "winter":
                    snow, low = w * 0.52, b - h * 0.22
                    poly([(x - snow, low), (x + snow, low), (x, b - h * 0.46)], (248, 250, 255))
        elif scene.kind == "round":
            rect(x - 1, y - h * 0.5, x + 1, y, colour=TRUNK)
            oval(x - h * 0.29, y - h, x + h * 0.29, y - h * 0.36, colour=round_)
        else:
            rect(x - 0.8, y - h * 0.4, x + 0.8, y, colour=TRUNK)
            oval(x - h * 0.15, y - h * 1.1, x + h * 0.15, y - h * 0.16, colour=poplar)

    left, base, w, h = scene.place

    def building():
        right, eave = left + w, base - h
        rect(left + w * 0.72, eave - 7.5, left + w * 0.86, eave, colour=(120, 100, 96))
        rect(left, eave, right, base, colour=HOUSE[house])
        poly([(left - 2, eave), (right + 2, eave), (left + w * 0.5, eave - 8.5)], roof)
        rect(left + w * 0.42, base - h * 0.62, left + w * 0.60, base, colour=(92, 62, 46))
        for f in (0.13, 0.70):
            x0, y0 = left + w * f, eave + h * 0.26
            pane = (255, 226, 120) if time == "night" else _lit((198, 226, 244), light)
            draw.rectangle(_box(x0, y0, x0 + w * 0.17, y0 + h * 0.32), fill=pane)

    things = [(y, tree, (x, y, t)) for x, y, t in scene.trees] + [(base, building, ())]
    for _, thing, args in sorted(things, key=lambda item: item[0]):
        thing(*args)
    if scene.bird:
        x, y = (scene.bird[0] + 40 * tau) % 72 - 4, scene.bird[1]
        wings = _points([(x - 2.6, y - 1.4), (x, y), (x + 2.6, y - 1.4)])
        draw.line(wings, fill=_lit((50, 46, 56), light), width=5)
    return np.asarray(img.reduce(SCALE), np.float32) / 255


def _pattern(phase, weather, tau):
    """Where rain or snow covers the picture: a lattice that begins at `phase` and falls with time;
    nowhere in other weather. -> (64, 64, 1), or 0"""
    if weather not in ("rain", "snowfall"):
        return 0.0
    img = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
    draw = ImageDraw.Draw(img)
    px, py = phase
    fall = 32 * tau if weather == "snowfall" else 96 * tau
    for row, col in itertools.product(range(-1, 6), range(-1, 6)):
        x = (col * 16 + (row % 2) * 8 + px) * SCALE
        y = ((row * 16 + py + (col % 3) * 5 + fall + 16) % 112 - 16) * SCALE
        if weather == "rain":
            draw.line([x, y, x - 2.2 * SCALE, y + 7 * SCALE], fill=255, width=4)
        else:
            draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=255)
            draw.ellipse([x + 27, y + 25, x + 35, y + 33], fill=255)
    return np.asarray(img.reduce(SCALE), np.float32)[..., None] / 255


def _weather(rgb, pattern, weather, time):
    """(..., 64, 64, 3) -> the same, in `weather`."""
    if weather == "fog":
        depth = np.clip(1.25 - np.abs(np.arange(SIZE) - 30) / 44, 0.35, 0.8).astype(np.float32)
        return rgb + depth[:, None, None] * (np.float32(FOG[time]) - rgb)
    if weather == "rain":
        grey = rgb.mean(-1, keepdims=True)
        rgb = 0.74 * (0.55 * rgb + 0.45 * grey) + np.float32((0.02, 0.03, 0.06))
        return rgb + 0.42 * pattern * (np.float32((0.74, 0.80, 0.90)) - rgb)
    if weather == "snowfall":
        return 0.88 * rgb + 0.06 + pattern * (np.float32(0.97) - (0.88 * rgb + 0.06))
    return rgb


def _style(rgb, style):
    """(..., 64, 64, 3) -> the same, drawn in `style`."""
    if style == "plain":
        return rgb
    if style == "pixel":  # 4x4 blocks of stronger colour
        blocks = rgb.reshape(*rgb.shape[:-3], SIZE // 4, 4, SIZE // 4, 4, 3).mean((-4, -2))
        blocks = np.clip(0.5 + 1.3 * (blocks - 0.5), 0, 1)
        return blocks.repeat(4, -3).repeat(4, -2)
    luma = rgb @ np.float32((0.3, 0.59, 0.11))
    pad = np.pad(luma, [(0, 0)] * (luma.ndim - 2) + [(1, 1)] * 2, mode="edge")
    gx = pad[..., 1:-1, 2:] - pad[..., 1:-1, :-2]
    gy = pad[..., 2:, 1:-1] - pad[..., :-2, 1:-1]
    lines = np.clip(1.8 * np.sqrt(gx * gx + gy * gy), 0, 1)[..., None]
    if style == "sketch":  # paper, a little colour, dark lines
        paper = np.float32((0.97, 0.95, 0.90))
        return (paper + 0.42 * (rgb - 1)) * (1 - 0.75 * lines)
    blue = 0.30 * luma[..., None] * np.float32((0.5, 0.8, 1.0))
    fill = np.float32((0.07, 0.22, 0.50)) + blue + 0.10 * rgb
    return fill + 0.85 * lines * (np.float32((0.90, 0.96, 1.0)) - fill)  # blueprint


def render(scene: Scene, tau: float = 0.0, falls: tuple[int, int] | None = None) -> np.ndarray:
    """Draws a Scene at time tau (one second is 1.0). falls: phase of rain or snow, if not the
    scene's own. -> (64, 64, 3) uint8"""
    rgb = _draw(scene, scene.season, scene.time, scene.house, tau)
    pattern = _pattern(falls or scene.phase, scene.weather, tau)
    return _bytes(_style(_weather(rgb, pattern, scene.weather, scene.time), scene.style))


def _bytes(rgb):
    return (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)


def judge(
    scene: Scene, images: np.ndarray, tau: float = 0.0, falls: tuple[int, int] | None = None
) -> list[dict]:
    """Reads the attributes of pictures that share a Scene's geometry: the nearest (least squared
    error) of all 960 combinations drawn for it. falls: phase of rain and snow in all of these, if
    not the scene's own. images: (n, 64, 64, 3) uint8 -> list of n dicts."""
    patterns = {w: _pattern(falls or scene.phase, w, tau) for w in ATTRIBUTES["weather"]}
    painted = list(itertools.product(ATTRIBUTES["season"], ATTRIBUTES["house"]))
    plain = {}
    for time in ATTRIBUTES["time"]:
        clear = [_draw(scene, season, time, house, tau) for season, house in painted]
        plain[time] = np.stack(clear)
    names, drawn = [], []
    kinds = [ATTRIBUTES[kind] for kind in ("time", "weather", "style")]
    for time, weather, style in itertools.product(*kinds):
        names += [(season, time, weather, house, style) for season, house in painted]
        group = _style(_weather(plain[time], patterns[weather], weather, time), style)
        drawn.append(group.reshape(len(group), -1))
    drawn = np.clip(np.concatenate(drawn), 0, 1)
    images = np.asarray(images, np.float32).reshape(len(images), -1) / 255
    error = (drawn**2).sum(1) - 2 * images @ drawn.T  # |image|^2 is the same for all
    return [dict(zip(ATTRIBUTES, names[i])) for i in error.argmin(1)]


# ---- words ---------------------------------------------------------------------------------------
NUMBER = ("no", "a", "two", "three", "four")
TREE = {
    "pine": ("pine tree", "pine"),
    "round": ("round tree", "leafy tree"),
    "poplar": ("poplar tree", "poplar"),
}
SEASON_WORDS = {
    "spring": ("spring",),
    "summer": ("summer",),
    "autumn": ("autumn", "fall"),
    "winter": ("winter",),
}
TIME_WORDS = {
    "day": ("at noon", "by day", "in daylight"),
    "sunset": ("at sunset", "at dusk"),
    "night": ("at night", "by night"),
}
WEATHER_WORDS = {
    "clear": ("in clear weather", "under a clear sky"),
    "fog": ("in fog", "in foggy weather"),
    "rain": ("in the rain", "in rainy weather"),
    "snowfall": ("in snowfall", "in snowy weather"),
}
STYLE_WORDS = {
    "plain": ("a picture of ", "a painting of "),
    "sketch": ("a pencil sketch of ", "a pencil drawing of "),
    "pixel": ("pixel art of ", "a pixel art picture of "),
    "blueprint": ("a blueprint of ",),
}
# The same as instructions ask for them; of weather the last is an order of its own.
TIME_ASKED = {"day": ("day", "daytime", "noon"), "sunset": ("sunset", "dusk"), "night": ("night",)}
WEATHER_ASKED = {
    "clear": ("clear", "clear weather", "clear the sky"),
    "fog": ("foggy", "foggy weather", "add fog"),
    "rain": ("rainy", "rainy weather", "make it rain"),
    "snowfall": ("snowy", "snowy weather", "add snowfall"),
}
STYLE_ASKED = {
    "plain": ("a painting", "a picture"),
    "sketch": ("a pencil sketch", "a pencil drawing"),
    "pixel": ("pixel art",),
    "blueprint": ("a blueprint",),
}


def _pick(rng, options):
    return str(options[rng.integers(len(options))])


def caption(scene: Scene, rng: np.random.Generator, drop: float = 0.2) -> str:
    """Describes a Scene in varied words; each attribute is left out with probability `drop`."""

    def keep():
        return rng.random() >= drop

    size = ""
    if scene.place[2] < 18.5:
        size = _pick(rng, ("small ", "little "))
    elif scene.place[2] > 21.5:
        size = _pick(rng, ("big ", "large "))
    house = "a "
    if rng.random() < 0.3:
        house += size
    if keep():
        house += scene.house + " "
    house += "house"
    if keep():
        house += " " + _trees(scene, rng)
    place = []
    if keep():
        word = _pick(rng, SEASON_WORDS[scene.season])
        ways = f"in {word}", f"in the {word}"
        if scene.time == "day":
            ways += (f"on a {word} day",)
        place.append(_pick(rng, ways))
    if keep():
        place.append(_pick(rng, TIME_WORDS[scene.time]))
    if keep() and (scene.weather != "clear" or rng.random() < 0.4):
        place.append(_pick(rng, WEATHER_WORDS[scene.weather]))
    place = [place[i] for i in rng.permutation(len(place))]
    text = " ".join([house, *place])
    if place and rng.random() < 0.15:  # "in winter at night a red house"
        text = " ".join([*place, house])
    named = 0.2 if scene.style == "plain" else 0.9  # how often a style is
    if rng.random() < named:
        return _pick(rng, STYLE_WORDS[scene.style]) + text
    return text


def _trees(scene, rng):
    n, word = len(scene.trees), _pick(rng, TREE[scene.kind])
    if n == 0:
        return _pick(rng, ("without trees", "with no trees"))
    beside = _pick(rng, ("with ", "by ", "next to ", "beside "))
    return f"{beside}{NUMBER[n]} {word}" + "s" * (n > 1)


# Of the wordings of an instruction the last is kept for tests.
ANY, SEEN, UNSEEN = slice(None), slice(-1), slice(-1, None)


def instruction(kind: str, value, rng: np.random.Generator, wordings: slice = ANY) -> str:
    """A wish for `kind` (an attribute, or trees: a Scene's number and kind of them) to become
    `value`, in varied words."""

    def say(*options):
        return _pick(rng, options[wordings])

    if kind == "house":
        return say(
            f"paint the house {value}",
            f"make the house {value}",
            f"make it a {value} house",
            f"turn the house {value}",
            f"change the house to {value}",
        )
    if kind == "season":
        word = _pick(rng, SEASON_WORDS[value])
        return say(
            f"make it {word}",
            f"turn it into {word}",
            f"change it to {word}",
            f"make it a {word} scene",
            f"change the season to {word}",
            f"make it look like {word}",
        )
    if kind == "time":
        asks = say("make it ", "turn it into ", "change it to ", "change the time to ")
        return asks + _pick(rng, TIME_ASKED[value])
    if kind == "weather":
        *words, order = WEATHER_ASKED[value]
        if rng.random() < 0.7 or wordings == UNSEEN:
            return say("make it ", "change the weather to ") + _pick(rng, words)
        return order
    if kind == "trees":
        number, word = value
        if number == 0:
            return say("remove the trees", "remove all trees", "make it a house without trees")
        trees = NUMBER[number] + " " + TREE[word][0] + "s" * (number > 1)
        return say(f"add {trees}", f"put {trees} by the house", f"make it a house with {trees}")
    return say("make it ", "turn it into ", "change it to ") + _pick(rng, STYLE_ASKED[value])


def wish(scene: Scene, rng: np.random.Generator) -> str:
    """A caption phrased as a wish ("make it winter and paint the house red"): what instructions
    look like to CLIP."""
    if rng.random() < 0.3:
        return "make it " + caption(scene, rng, drop=0.4)
    kinds = []
    for kind in ATTRIBUTES:
        if getattr(scene, kind) not in ("plain", "clear") or rng.random() < 0.3:
            kinds.append(kind)
    kinds = rng.permutation(kinds)[: rng.integers(1, 4)]
    return " and ".join(instruction(kind, getattr(scene, kind), rng) for kind in kinds)


# ---- pages and folders ---------------------------------------------------------------------------
def sheet(rows: list[list[np.ndarray]], scale: int = 2, gap: int = 4) -> Image.Image:
    """rows: list of equally long lists of (h, w, 3) uint8 -> one PIL picture."""
    h, w = rows[0][0].shape[:2]
    height = len(rows) * (h + gap) + gap
    width = max(map(len, rows)) * (w + gap) + gap
    page = np.full((height, width, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = gap + i * (h + gap), gap + j * (w + gap)
            page[top : top + h, left : left + w] = picture
    return Image.fromarray(page).resize((width * scale, height * scale), Image.NEAREST)


def _world(rng):
    """Six scenes, each with one attribute after the other changed."""
    rows = []
    for _ in range(6):
        scene = sample_scene(rng, style="plain", weather="clear")
        row = [render(scene)]
        for kind, values in ATTRIBUTES.items():
            for value in values:
                if value not in ("clear", "plain"):  # which it is
                    row.append(render(dataclasses.replace(scene, **{kind: value})))
        rows.append(row)
    return sheet(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    meaning = "a .png for a page of the world, or a folder to fill with pictures and captions"
    parser.add_argument("out", help=meaning)
    parser.add_argument("--n", type=int, default=96)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--frames", type=int, default=1, help="above 1: of clips (animated WebP)")
    args = parser.parse_args()
    rng, out = np.random.default_rng(args.seed), pathlib.Path(args.out)
    if out.suffix == ".png":
        return _world(rng).save(out)
    out.mkdir(parents=True, exist_ok=True)
    seasons, lines = ("spring", "summer", "autumn"), []
    suffix, options = "png", {}
    if args.frames > 1:
        suffix = "webp"
        options = {"duration": 125, "lossless": True, "quality": 100, "method": 6}
    for i in range(args.n):
        scene = sample_scene(rng, season=seasons[i % len(seasons)], style="plain")
        name = f"{i:03d}.{suffix}"
        first, *others = (Image.fromarray(render(scene, k / 8)) for k in range(args.frames))
        if others:
            options |= {"save_all": True, "append_images": others}
        first.save(out / name, **options)
        lines.append(json.dumps({"file_name": name, "text": caption(scene, rng, drop=0.0)}))
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
