"""Pictures of any kind come in upright and RGB; words become prompts; bad input gets one sentence."""

import argparse
import json
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data
import scenes
from files.disk import UserError  # noqa: E402
from files.pictures import load_image  # noqa: E402
from train import encode


@pytest.mark.parametrize(
    "instr, caption, tgt, undo",
    [
        ("make it winter", "a red house in summer", "a red house in winter", "make it summer"),
        (
            "make it winter",
            "a red house in the fall",
            "a red house in the winter",
            "make it autumn",
        ),
        (
            "make it winter",
            "a red house by a lake",
            "a red house by a lake in winter",
            "make it a red house by a lake",
        ),
        (
            "paint the house blue",
            "a red house at night",
            "a blue house at night",
            "paint the house red",
        ),
        (
            "make it night",
            "a red house by day in spring",
            "a red house at night in spring",
            "make it noon",
        ),
        (
            "make it night",
            "a red house on a spring day at noon",
            "a red house in spring at night",
            "make it noon",
        ),
        (
            "make it night",
            "a red house on a spring day",
            "a red house in spring at night",
            "make it a red house on a spring day",
        ),
        (
            "change the weather to foggy",
            "a house in the rain",
            "a house in fog",
            "change the weather to rainy weather",
        ),
        ("make it snow", "a house in the rain", "a house in snowfall", "make it rainy weather"),
        ("make it rain", "a house in snowfall", "a house in the rain", "make it snowy weather"),
        (
            "change the lake to a desert",
            "a house by the lake",
            "a house by a desert",
            "change a desert to the lake",
        ),
        ("add a boat", "a lake", "a lake with a boat", "make it a lake"),
        ("remove the boat", "a lake with a boat", "a lake", "make it a lake with a boat"),
        ("remove the fog", "a house in fog", "a house", "make it a house in fog"),
        (
            "remove the red car",
            "a blue house with a red car",
            "a blue house",
            "make it a blue house with a red car",
        ),
        (
            "add a red barn",
            "a white house",
            "a white house with a red barn",
            "make it a white house",
        ),
        ("add fog", "a house in clear weather", "a house in fog", "add clear weather"),
        (
            "change summer to winter",
            "a house in summer",
            "a house in winter",
            "change winter to summer",
        ),
        (
            "paint the red house blue",
            "a red house by a blue lake",
            "a blue house by a blue lake",
            "paint the blue house red",
        ),
        (
            "paint the house blue",
            "a white house with a blue car",
            "a blue house with a blue car",
            "paint the house white",
        ),
        (
            "change the house to a castle",
            "a red house",
            "a red castle",
            "change the castle to a house",
        ),
        (
            "turn the photo into a pencil sketch",
            "a photo of a dog",
            "a pencil sketch of a dog",
            "turn the pencil sketch into a photo",
        ),
        (
            "make it a photo",
            "a pencil sketch of a dog",
            "a photo of a dog",
            "make it a pencil sketch",
        ),
        ("make it look old", "a lake", "a lake, look old", "make it a lake"),
    ],
)
def test_grammar(instr, caption, tgt, undo):
    assert data.derive(instr, caption) == (tgt, undo)


@pytest.mark.parametrize(
    "instr, caption",
    [
        ("make it winter", "a house in winter"),
        ("change summer to winter", "a house in winter"),
        ("paint the red house blue", "a blue house in summer"),
        ("remove the fog", "a house in rain"),
    ],
)
def test_grammar_leaves_out_what_is_so_already(instr, caption):
    assert data.derive(instr, caption) is None


def test_every_caption_of_the_world_swaps_exactly_its_season():
    rng = np.random.default_rng(3)
    for _ in range(300):
        scene = scenes.sample_scene(rng, season="summer", style="plain")
        caption = scenes.caption(scene, rng, drop=0.0)
        assert data.derive("make it winter", caption) == (
            caption.replace("summer", "winter"),
            "make it summer",
        )


def save(array_or_image, path, **k):
    (
        array_or_image
        if isinstance(array_or_image, Image.Image)
        else Image.fromarray(array_or_image)
    ).save(path, **k)
    return path


def test_modes_and_exif(tmp_path):
    rgb = np.zeros((20, 30, 3), np.uint8)
    rgb[:10], rgb[10:] = (255, 0, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = load_image(save(rgb, tmp_path / "a.PNG", exif=exif))
    assert turned[0, 0].tolist() == [0, 0, 255]
    corners = np.zeros((16, 24, 3), np.uint8)
    corners[:8, :12], corners[:8, 12:], corners[8:, :12] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        for suffix in ("png", "tif", "webp"):
            path = save(
                corners,
                tmp_path / f"{turn}.{suffix}",
                exif=exif,
                **{"lossless": True} if suffix == "webp" else {},
            )
            assert (
                load_image(path).tolist()
                == np.asarray(ImageOps.exif_transpose(Image.open(path))).tolist()
            ), path
    exif = struct.pack(
        "<6s4sIH HHIHH HHI4s I", b"Exif", b"II*", 8, 2, 0x0112, 3, 1, 6, 0, 0x011A, 2, 3, b"72", 0
    )  # a resolution in letters
    assert load_image(save(corners, tmp_path / "odd.jpg", exif=exif)).shape == (24, 16, 3)
    grey16 = np.full((8, 8), 32768, np.uint16)
    assert abs(int(load_image(save(grey16, tmp_path / "g.png"))[0, 0, 0]) - 128) <= 1
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert load_image(save(clear, tmp_path / "t.png"))[0, 0].tolist() == [255, 255, 255]
    for mode in ("1", "L", "P", "CMYK", "LA"):
        suffix = ".tif" if mode == "CMYK" else ".png"
        assert load_image(
            save(Image.fromarray(rgb).convert(mode), tmp_path / ("m" + mode + suffix)), (16, 16)
        ).shape == (16, 16, 3)


@pytest.mark.parametrize(
    "picture, size",
    [((1200, 900), (56, 72)), ((2400, 1800), (448, 592)), ((900, 1200), (448, 448))],
)
def test_sizes_that_do_not_divide_evenly_are_cropped(picture, size, tmp_path):
    assert load_image(save(Image.new("RGB", picture), tmp_path / "a.png"), size).shape == (
        *size,
        3,
    )


def test_views_are_the_picture_then_random_crops_and_mirrorings_of_it(tmp_path):
    """A picture whose every pixel holds its own place tells where a view was taken."""
    place = np.stack(
        [
            np.tile(np.arange(100), (100, 1)),
            np.tile(np.arange(100)[:, None], (1, 100)),
            np.zeros((100, 100)),
        ],
        -1,
    ).astype(np.uint8)
    rows = [{"path": save(place, tmp_path / "a.png")}]
    images = np.stack([views for views, _ in data.load_rows(rows, (50, 50), views=40)])
    assert images.shape == (1, 40, 50, 50, 3) and np.array_equal(
        images[0, 0], load_image(rows[0]["path"], (50, 50))
    )
    assert np.array_equal(images[0], next(data.load_rows(rows, (50, 50), views=40))[0])
    left, right, top, bottom = (
        images[0, 1:, 25, 2, 0],
        images[0, 1:, 25, -3, 0],
        images[0, 1:, 2, 25, 1],
        images[0, 1:, -3, 25, 1],
    )
    spans = abs(left.astype(int) - right) / 45  # over 45 of 50 columns; the full picture gives 2
    assert (
        spans.min() > 1.5
        and spans.max() <= 2.1
        and np.allclose(spans, (bottom.astype(int) - top) / 45, atol=0.1)
    )
    assert 8 < (left > right).sum() < 31 and np.minimum(left, right).std() > 2 and top.std() > 2


def test_captions_and_tuples(tmp_path):
    for name in ("a.png", "b.JPG", "c.png"):
        save(np.zeros((8, 8, 3), np.uint8), tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text(
        json.dumps({"file_name": "a.png", "text": "a house in summer"})
    )
    (tmp_path / "b.txt").write_text(
        "a lake in spring\n", "utf-8-sig"
    )  # as Windows' editor writes it
    (tmp_path / "out").mkdir()
    save(np.zeros((8, 8, 3), np.uint8), tmp_path / "out" / "edit.png")
    assert (
        len(data.find(tmp_path, without=[tmp_path / "out"])[0]) == 3
        and len(data.find(tmp_path / "out", without=[tmp_path])[0]) == 1
    )
    shutil.rmtree(tmp_path / "out")
    rows = data.read_prompts(tmp_path, data.find(tmp_path)[0], "make it winter")
    assert [r["src"] for r in rows] == ["a house in summer", "a lake in spring", "a picture"]
    line = {"file_name": "a.png", "src": "s", "tgt": "t", "instr": "i", "undo": "u"}
    (tmp_path / "tuples.jsonl").write_text(
        json.dumps(line)
    )  # a line of its own comes before the command line
    rows = data.read_prompts(tmp_path, data.find(tmp_path)[0], "make it winter")
    assert [(r["src"], r["instr"]) for r in rows] == [
        ("s", "i"),
        ("a lake in spring", "make it winter"),
        ("a picture", "make it winter"),
    ]
    (tmp_path / "tuples.jsonl").write_text(
        "\n".join(json.dumps(line | {"file_name": n}) for n in ("a.png", "b.JPG", "c.png"))
    )
    with pytest.raises(UserError, match="leave --instr away"):
        data.read_prompts(tmp_path, data.find(tmp_path)[0], "make it winter")
    (tmp_path / "tuples.jsonl").write_text(
        json.dumps({"file_name": "a.png", "src": "s", "tgt": "t", "instr": "i"})
    )
    with pytest.raises(UserError, match="line 1: the field 'undo' is missing"):
        data.read_prompts(tmp_path, data.find(tmp_path)[0])
    (tmp_path / "tuples.jsonl").write_text(
        json.dumps(
            {
                "file_name": "a.png",
                "src": "",
                "tgt": "",
                "instr": "",
                "undo": "",
                "own_noise": "false",
            }
        )
    )
    with pytest.raises(UserError, match="own_noise of 'a.png' must be true or false"):
        data.read_prompts(tmp_path, data.find(tmp_path)[0])
    (tmp_path / "tuples.jsonl").write_text(
        json.dumps({"file_name": "x.png", "src": "s", "tgt": "t", "instr": "i", "undo": "u"})
    )
    with pytest.raises(UserError, match="x.png"):
        data.read_prompts(tmp_path, data.find(tmp_path)[0])


def test_the_judge_reads_back_what_the_renderer_drew():
    rng = np.random.default_rng(5)
    for _ in range(6):
        scene = scenes.sample_scene(rng)
        assert scenes.judge(scene, scenes.render(scene)[None])[0] == {
            k: getattr(scene, k) for k in scenes.ATTRIBUTES
        }


def test_cached_latents_are_never_stale(tmp_path):
    """An encoder that counts: asked once for the same pixels, again for others, another shape, another encoder, and where the file is damaged."""
    asked, vae = (
        [],
        argparse.Namespace(encode=lambda pixels: asked.append(len(pixels)) or pixels * 2),
    )
    views = np.random.default_rng(0).integers(0, 256, (3, 4, 8, 3), np.uint8)
    cached = lambda views, known=b"a": encode(
        vae, views, torch.device("cpu"), tmp_path / "new" / "latents", known
    )  # noqa: E731
    first = cached(views)
    assert (
        first.equal(cached(views))
        and first.equal(encode(vae, views, torch.device("cpu"), None, b""))
        and asked == [3, 3]
    )
    (file,) = (tmp_path / "new" / "latents").iterdir()
    for more in (
        lambda: cached(views + 1),
        lambda: cached(views.reshape(3, 8, 4, 3)),
        lambda: cached(views, b"b"),
    ):
        before = len(asked)
        more(), more()
        assert len(asked) == before + 1
    file.write_bytes(file.read_bytes()[:-9])
    assert (
        first.equal(cached(views))
        and len(asked) == 6
        and first.equal(cached(views))
        and len(asked) == 6
    )
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        encode(vae, views, torch.device("cpu"), tmp_path / "file", b"")
