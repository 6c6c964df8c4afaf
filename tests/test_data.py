"""Words become prompts, pictures of any kind come in upright and RGB, rows become batches."""

import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import scenes
from data import KINDS, Encoded, derive, draw, read_prompts
from files.disk import UserError
from files.folder import find
from files.pictures import load_image
from train import Recipe

# ---- the grammar -------------------------------------------------------------------------------
# instruction | caption | target | undo
DERIVED = """
make it winter | a red house in summer | a red house in winter | make it summer
make it winter | a red house in the fall | a red house in the winter | make it autumn
make it winter | a red house by a lake | a red house by a lake in winter \
    | make it a red house by a lake
paint the house blue | a red house at night | a blue house at night | paint the house red
make it night | a red house by day in spring | a red house at night in spring | make it noon
make it night | a red house on a spring day at noon | a red house in spring at night | make it noon
make it night | a red house on a spring day | a red house in spring at night \
    | make it a red house on a spring day
change the weather to foggy | a house in the rain | a house in fog \
    | change the weather to rainy weather
make it snow | a house in the rain | a house in snowfall | make it rainy weather
make it rain | a house in snowfall | a house in the rain | make it snowy weather
change the lake to a desert | a house by the lake | a house by a desert \
    | change a desert to the lake
add a boat | a lake | a lake with a boat | make it a lake
remove the boat | a lake with a boat | a lake | make it a lake with a boat
remove the fog | a house in fog | a house | make it a house in fog
remove the red car | a blue house with a red car | a blue house \
    | make it a blue house with a red car
add a red barn | a white house | a white house with a red barn | make it a white house
add fog | a house in clear weather | a house in fog | add clear weather
change summer to winter | a house in summer | a house in winter | change winter to summer
paint the red house blue | a red house by a blue lake | a blue house by a blue lake \
    | paint the blue house red
paint the house blue | a white house with a blue car | a blue house with a blue car \
    | paint the house white
change the house to a castle | a red house | a red castle | change the castle to a house
turn the photo into a pencil sketch | a photo of a dog | a pencil sketch of a dog \
    | turn the pencil sketch into a photo
make it a photo | a pencil sketch of a dog | a photo of a dog | make it a pencil sketch
make it look old | a lake | a lake, look old | make it a lake
"""
DERIVED = [[part.strip() for part in line.split("|")] for line in DERIVED.strip().splitlines()]
SO_ALREADY = [
    ("make it winter", "a house in winter"),
    ("change summer to winter", "a house in winter"),
    ("paint the red house blue", "a blue house in summer"),
    ("remove the fog", "a house in rain"),
]


@pytest.mark.parametrize("instr, caption, tgt, undo", DERIVED)
def test_grammar(instr, caption, tgt, undo):
    assert derive(instr, caption) == (tgt, undo)


@pytest.mark.parametrize("instr, caption", SO_ALREADY)
def test_grammar_leaves_out_what_is_so_already(instr, caption):
    assert derive(instr, caption) is None


def test_every_caption_of_the_world_swaps_exactly_its_season():
    rng = np.random.default_rng(3)
    for _ in range(300):
        scene = scenes.sample_scene(rng, season="summer", style="plain")
        caption = scenes.caption(scene, rng, drop=0.0)
        winter = caption.replace("summer", "winter")
        assert derive("make it winter", caption) == (winter, "make it summer")


# ---- pictures ----------------------------------------------------------------------------------
def save(picture, path, **options):
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(picture)
    picture.save(path, **options)
    return path


def turned(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


def corners():
    """Red and green above, blue and black below."""
    picture = np.zeros((16, 24, 3), np.uint8)
    picture[:8, :12], picture[:8, 12:], picture[8:, :12] = np.diag([255, 255, 255])
    return picture


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_come_in_upright(turn, suffix, tmp_path):
    """As Pillow's own exif_transpose turns them."""
    lossless = {"lossless": True} if suffix == "webp" else {}
    path = save(corners(), tmp_path / f"a.{suffix}", exif=turned(turn), **lossless)
    with Image.open(path) as picture:
        assert np.array_equal(load_image(path), ImageOps.exif_transpose(picture))


def test_a_picture_with_an_odd_tag_is_turned_all_the_same(tmp_path):
    """Its resolution is in letters, at which exif_transpose stumbles."""
    tags = 0x0112, 3, 1, 6, 0, 0x011A, 2, 3, b"72", 0
    exif = struct.pack("<6s4sIH HHIHH HHI4s I", b"Exif", b"II*", 8, 2, *tags)
    assert load_image(save(corners(), tmp_path / "odd.jpg", exif=exif)).shape == (24, 16, 3)


def test_every_mode_becomes_rgb(tmp_path):
    for mode in ("1", "L", "P", "CMYK", "LA"):
        suffix = "tif" if mode == "CMYK" else "png"
        path = save(Image.fromarray(corners()).convert(mode), tmp_path / f"{mode}.{suffix}")
        assert load_image(path, (16, 16)).shape == (16, 16, 3)
    half = np.full((8, 8), 32768, np.uint16)
    assert load_image(save(half, tmp_path / "16bit.png"))[0, 0, 0] in (127, 128, 129)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert load_image(save(clear, tmp_path / "clear.png"))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    "picture, size",
    [((1200, 900), (56, 72)), ((2400, 1800), (448, 592)), ((900, 1200), (448, 448))],
)
def test_sizes_that_do_not_divide_evenly_are_cropped(picture, size, tmp_path):
    path = save(Image.new("RGB", picture), tmp_path / "a.png")
    assert load_image(path, size).shape == (*size, 3)


# ---- a folder ----------------------------------------------------------------------------------
NAMES = ("a.png", "b.JPG", "c.png")
LINE = {"src": "s", "tgt": "t", "instr": "i", "undo": "u"}


@pytest.fixture
def folder(tmp_path):
    """Three pictures: a caption in metadata.jsonl, one in a .txt as Windows' editor writes it, and
    none."""
    for name in NAMES:
        save(np.zeros((8, 8, 3), np.uint8), tmp_path / name)
    line = {"file_name": "a.png", "text": "a house in summer"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    (tmp_path / "b.txt").write_text("a lake in spring\n", "utf-8-sig")
    return tmp_path


def write_tuples(folder, *lines):
    (folder / "tuples.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_captions_come_from_metadata_a_text_file_or_nowhere(folder):
    rows = read_prompts(folder, find(folder)[0], "make it winter")
    assert [row["src"] for row in rows] == ["a house in summer", "a lake in spring", "a picture"]


def test_a_line_of_tuples_goes_before_the_command_line(folder):
    """Fields that nobody knows are passed over."""
    write_tuples(folder, {"file_name": "a.png", "own_noise": True} | LINE)
    rows = read_prompts(folder, find(folder)[0], "make it winter")
    assert rows[0] == {"path": folder / "a.png"} | LINE
    assert [row["instr"] for row in rows[1:]] == ["make it winter"] * 2


@pytest.mark.parametrize(
    "lines, instr, words",
    [
        ([{"file_name": n} | LINE for n in NAMES], "make it winter", "leave --instr away"),
        ([{"file_name": "a.png"} | LINE], None, "no instruction for .*b.JPG"),
        ([{"file_name": "a.png", "src": "s"}], None, "line 1: the field 'tgt' is missing"),
        ([{"file_name": "a.png"} | LINE | {"undo": 1}], None, "line 1: the field 'undo' is"),
        ([{"file_name": "x.png"} | LINE], None, "names 'x.png', which is no image"),
        (["x.png"], None, "line 1: is no JSON object"),
    ],
)
def test_wrong_tuples_are_refused(folder, lines, instr, words):
    write_tuples(folder, *lines)
    with pytest.raises(UserError, match=words):
        read_prompts(folder, find(folder)[0], instr)


def test_a_runs_own_pictures_are_no_data(folder):
    (folder / "out").mkdir()
    save(np.zeros((8, 8, 3), np.uint8), folder / "out" / "edit.png")
    assert len(find(folder, without=[folder / "out"])[0]) == 3
    assert len(find(folder / "out", without=[folder])[0]) == 1


# ---- batches -----------------------------------------------------------------------------------
def encoded(rows=12, frames=1):
    """Latents and texts whose numbers say which row and which frame they are of."""
    place = torch.arange(rows)[:, None] + torch.arange(frames) / 100  # (rows, frames)
    latents = [of_row.view(-1, 1, 1, 1).expand(-1, 2, 4, 4) for of_row in place]
    context = torch.arange(rows).view(-1, 1, 1).expand(-1, 3, 5).float()
    ids = {kind: torch.arange(rows) for kind in (*KINDS, "null")}
    return Encoded([{}] * rows, latents, (context, context[:, 0]), ids)


def drawn(frames=1, seed=0, mine=slice(None), clip=1, **recipe):
    """A batch of eight of twelve rows; clip: how long the clips are."""
    recipe = Recipe(**{"batch": 8, "n": 4} | recipe)
    rng = torch.Generator().manual_seed(seed)
    return draw(encoded(frames=clip), torch.arange(12), recipe, frames, rng, mine, "cpu")


def parts(batch):
    prompts = [a for kind in (*KINDS, "null") for a in getattr(batch, kind)]
    return [batch.x, batch.eps, batch.eps_cue, batch.k, *prompts]


def equal(batch, other):
    return [torch.equal(a, b) for a, b in zip(parts(batch), parts(other))]


def test_the_same_rng_draws_the_same_batch():
    assert all(equal(drawn(), drawn()))
    assert not any(equal(drawn(), drawn(seed=1)))


@pytest.mark.parametrize("frames", [1, 3])
def test_the_shares_of_two_ranks_are_together_the_whole_batch(frames):
    whole, *shares = (
        parts(drawn(frames, clip=5, mine=mine))
        for mine in (slice(None), slice(0, None, 2), slice(1, None, 2))
    )
    for all_of_it, first, second in zip(whole, *shares):
        each = [share.unflatten(0, (4, frames)) for share in (first, second)]
        assert torch.equal(torch.stack(each, 1).flatten(0, 2), all_of_it)


def test_the_cue_has_a_noise_of_its_own_but_for_the_others_than_delta():
    delta = drawn(cue="delta")
    assert (delta.eps_cue - delta.eps).abs().mean() > 0.5
    for cue in ("delta-own", "cosine"):
        batch = drawn(cue=cue)
        assert torch.equal(batch.eps_cue, batch.eps) and torch.equal(batch.eps, delta.eps)


def test_a_sample_is_consecutive_frames_of_one_clip_under_one_noise_and_its_own_words():
    batch = drawn(frames=3, clip=5)
    x, eps, eps_cue, k = (a.unflatten(0, (8, 3)) for a in parts(batch)[:4])
    row, first = x[:, 0, 0, 0, 0].floor(), x[:, 0, 0, 0, 0] % 1
    for i in range(3):
        torch.testing.assert_close(x[:, i, 0, 0, 0], row + first + i / 100)
        for a in (eps, eps_cue, k):
            assert torch.equal(a[:, i], a[:, 0])
    assert first.unique().numel() > 1  # windows begin anywhere
    assert all(torch.equal(p[::3].flatten(1)[:, 0], row) for p in parts(batch)[4:])


def test_the_nodes_of_the_time_grid_are_evenly_covered():
    for seed in range(20):
        counts = drawn(seed=seed).k.bincount(minlength=4).tolist()
        assert counts == [2, 2, 2, 2]
        uneven = drawn(seed=seed, n=5).k.bincount(minlength=5).tolist()
        assert len(uneven) == 5 and min(uneven) >= 1 and max(uneven) <= 2


# ---- the world of the pictures -----------------------------------------------------------------
def test_the_judge_reads_back_what_the_renderer_drew():
    rng = np.random.default_rng(5)
    for _ in range(6):
        scene = scenes.sample_scene(rng)
        read = scenes.judge(scene, scenes.render(scene)[None])[0]
        assert read == {kind: getattr(scene, kind) for kind in scenes.ATTRIBUTES}
