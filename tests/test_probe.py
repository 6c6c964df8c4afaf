"""What the frozen base says, against what is known of its world: the words it was trained on, and
the renderer's true edits."""

import json

import numpy as np
import pytest
import torch

import edits
import scenes
from data import check_captions, derive, encode, read_prompts
from files.disk import UserError
from files.folder import find, one_line
from frozen.load import load_base
from frozen.probe import KNOWN, STEADY, SURPRISED, judge, passes, probe, verdict, warnings_of
from frozen.vae import to_pixels
from train import RECIPES


@pytest.fixture(scope="module")
def base():
    with torch.no_grad():
        yield load_base("tiny")


# ---- before training ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "instr, known, steady",
    [
        ("make it winter", True, True),
        ("make it night", True, True),
        ("make it snow", True, False),  # falls elsewhere under every noise
        ("turn the house into a castle", False, None),  # a word the base never read
    ],
)
@torch.no_grad()
def test_the_probe_tells_edits_the_base_knows_from_others(base, few, instr, known, steady):
    model, vae, text, _ = base
    data = encode(read_prompts(few, find(few)[0], instr), (64, 64), 1, vae, text, "cpu")
    table, seconds = probe(model, data, torch.arange(len(data.rows)))
    share, agreement = (sum(row[k] for row in table) / len(table) for k in ("share", "agreement"))
    assert (share > KNOWN) == known and 0 < seconds < 60
    said = verdict(table, "a house", "a castle")
    assert ("hardly tells" in said) == (not known)
    if known:
        assert (agreement > STEADY) == steady == ("other places" not in said)


def test_a_steps_passes_are_counted_as_in_the_method():
    """Of the paper: 10 of the rollout, 4 of the teacher, 3 each of edit, way back, and identity in
    15 of 100 steps."""
    assert passes(RECIPES["paper"]) == pytest.approx(10 + 4 + 3 * 2.15)
    assert passes(RECIPES["default"]) == pytest.approx(8 + 3 + 3 * 2.25)


# ---- of a sheet ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def winter(base):
    """Eight scenes and their true winter, as latents, with their captions' embeddings."""
    model, vae, text, _ = base
    world = []
    for i in range(40):
        scene = scenes.sample_scene(np.random.default_rng((71, i)))
        if scene.season != "winter" and scene.style == "plain":
            world.append(scene)
    world = world[:8]
    changed = [edits.change(scene, "season", "winter") for scene in world]
    captions = [scenes.caption(s, np.random.default_rng(0), drop=0.0) for s in world]
    x, y = (vae.encode(to_pixels(np.stack([*map(scenes.render, w)]))) for w in (world, changed))
    return x, y, text(captions), text([derive("make it winter", c)[0] for c in captions])


@torch.no_grad()
def test_the_base_judges_true_edits_copies_and_what_is_no_picture(base, winter):
    x, truth, src, tgt = winter
    drifted = x.roll(1, 0) + torch.randn_like(x)
    for y, likelier, surprise in (
        (truth, 1.0, (0.5, 2.0)),
        (x, 0.0, (0.5, 2.0)),
        (drifted, None, (SURPRISED, 100)),
    ):
        margin, shock = judge(base[0], x, y, src, tgt)
        assert likelier is None or (margin > 0).float().mean() == likelier
        assert surprise[0] < shock.mean() < surprise[1]


def test_a_sheets_warnings_name_copies_and_drift():
    good = {"undone": 27.0, "likelier": 1.0, "surprise": 1.3}
    assert warnings_of(good) == []
    (copies,) = warnings_of(good | {"likelier": 0.17})
    (drift,) = warnings_of(good | {"surprise": 4.8})
    assert "nearly copies" in copies and "drifting" in drift


# ---- captions -----------------------------------------------------------------------------------
def test_whatever_is_printed_of_a_caption_is_one_line(few, tmp_path, capsys):
    assert one_line("a\n  house") == "a house"
    assert len(one_line("a house " * 50_000)) == 90
    (tmp_path / "a.png").write_bytes((few / "000.png").read_bytes())
    (tmp_path / "a.txt").write_text("a house\n" * 50_000)
    read_prompts(tmp_path, find(tmp_path)[0], "make it winter")
    assert max(map(len, capsys.readouterr().err.splitlines())) < 250


def test_captions_that_are_cut_alike_are_found_by_their_tokens(base, capsys):
    text = base[2]
    rows = [{"src": "a house in summer", "tgt": "a house in winter"}]
    check_captions(rows, text)
    assert not capsys.readouterr().err
    cut = {"src": "a house " * 15, "tgt": "a house " * 15 + "in winter"}
    check_captions([*rows, cut], text)
    assert "1 of 2 target captions read like their source's" in capsys.readouterr().err
    with pytest.raises(UserError, match="1 of 1 target captions"):
        check_captions([cut], text)


def test_lines_of_jsonl_files_find_their_pictures_or_are_refused(few, tmp_path, capsys):
    """Names with "./"; of what is left out; unknown ones; two for one picture."""
    for name in ("a.png", "._a.png"):  # a Mac's shadow of it is no picture
        (tmp_path / name).write_bytes((few / "000.png").read_bytes())
    (tmp_path / "b.mp4").write_bytes(b"")
    captions = tmp_path / "metadata.jsonl"
    lines = [{"file_name": name, "text": "a house in autumn"} for name in ("./a.png", "b.mp4")]
    captions.write_text("\n".join(map(json.dumps, lines)))
    (path,) = paths = find(tmp_path)[0]
    assert path.name == "a.png" and "clips left out: 1 (b.mp4)" in capsys.readouterr().err
    (row,) = read_prompts(tmp_path, paths, "make it winter")
    assert row["src"] == "a house in autumn"
    for name, words in (
        ("A.png", "names 'A.png'"),
        ("a" * 5000, "names 'aaa"),
        ("a.png", "line 3: 'a.png' has a line"),
    ):
        captions.write_text("\n".join(map(json.dumps, [*lines, lines[0] | {"file_name": name}])))
        with pytest.raises(UserError, match=words):
            read_prompts(tmp_path, paths, "make it winter")


def test_off_the_embedded_base_pictures_want_captions(few, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes((few / "000.png").read_bytes())
    (tmp_path / "b.png").write_bytes((few / "001.png").read_bytes())
    paths = find(tmp_path)[0]
    with pytest.raises(UserError, match="metadata.jsonl .* or in a.txt .* or give one for all"):
        read_prompts(tmp_path, paths, "make it winter", strict=True)
    assert len(read_prompts(tmp_path, paths, "make it winter", "a farm", strict=True)) == 2
    assert "remove pictures that already" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("a farm in autumn")
    rows = read_prompts(tmp_path, paths, "make it winter", strict=True)
    assert [row["src"] for row in rows] == ["a farm in autumn", "a picture"]
    assert '1 without a caption count as "a picture"' in capsys.readouterr().err
