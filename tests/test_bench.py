"""The measuring tools measure what they say."""

import json
from dataclasses import replace
from unittest import mock

import evaluate
import numpy as np
import pytest
import readme
import speed
import torch
from conftest import ROOT, call
from diffusers import AutoencoderKL
from memory import SD3, TEXTS, VAE_CONFIG, Meter, forward_tflop, other_memory, step_memory
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import edits
import scenes
from frozen.load import load_base
from model import MMDiT

SMALL = SD3 | {"num_layers": 2, "num_attention_heads": 8, "qk_norm": "rms_norm"}


def gib(module, bytes_each):
    return sum(v.numel() for v in module.state_dict().values()) * bytes_each / 2**30


# ---- memory and time ---------------------------------------------------------------------------
def test_the_memory_meter_counts_what_is_alive_and_what_autograd_keeps():
    x = torch.zeros(1000, requires_grad=True)
    with Meter() as meter:
        y = x.exp()  # 4,000 bytes, kept for the gradient even when the name is gone
        z = (y + 1).sum()  # another 4,000, freed at once; a sum of 4
        assert (meter.peak, meter.now) == (8004, 4004)
        del y
        assert meter.now == 4004
        z.backward()
        assert x.grad is not None and meter.now == 4004  # y is freed, the gradient is there


def test_checkpointing_saves_memory_and_weights_are_counted_exactly():
    kept, again = (step_memory(SMALL, 128, 1, 4, checkpointing=c) for c in (False, True))
    with torch.device("meta"):
        weights = gib(MMDiT(SMALL), 2)
    assert again["peak"] < kept["peak"]
    assert again["weights"] == kept["weights"] == pytest.approx(weights, abs=0.01)


def test_encoders_and_decoder_are_counted_too():
    """Against the sizes of diffusers' and transformers' modules. Of the sheet 200 small pictures
    are still decoded 64 at a time."""
    with torch.device("meta"):
        down, up = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
        vae = AutoencoderKL(**VAE_CONFIG, down_block_types=down, up_block_types=up)
        there = gib(MMDiT(SMALL), 2) + gib(vae, 4)
        for config in TEXTS:
            there += gib(CLIPTextModelWithProjection(CLIPTextConfig(**config)), 2)
    one, many = (other_memory(SMALL, 64, 4, held=n) for n in (1, 200))
    assert one["decoder"] == pytest.approx(gib(vae.decoder, 4), abs=0.006)
    assert there < one["encoding"] < there + 0.2
    assert one["sheet"] < many["sheet"] < one["sheet"] * 64


def test_operations_are_counted_as_by_hand():
    """Projections and MLP, then attention, of 8 layers; the rest, embeddings, modulation and the
    adapter, is under a tenth."""
    d, n, text = 512, 256, 78  # 256 pixels: 256 image tokens
    by_hand = 8 * (n + text) * 12 * d**2 * 2 + 8 * 4 * (n + text) ** 2 * d
    counted = 1e12 * forward_tflop(SMALL | {"num_layers": 8}, 256, 4)
    assert counted == pytest.approx(by_hand, rel=0.1)


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_the_price_of_a_step_is_taken_with_the_options_of_today(recipe):
    few = replace(speed.RECIPES[recipe], batch=2, n=2, rank=4)
    with mock.patch.dict(speed.RECIPES, {recipe: few}):
        priced = speed.byg_step(load_base("tiny"), recipe, 2)
    assert priced.keys() == {"step", "rollout", "teacher"}
    assert priced["step"]["ratio"] > priced["rollout"]["ratio"] > 0


# ---- the README --------------------------------------------------------------------------------
def test_the_readme_leads_somewhere(tmp_path):
    assert readme.broken_links(ROOT / "README.md") == []
    page = tmp_path / "page.md"
    inside, outside = "[a](#one-way) [b](#another)", "[c](gone.md) [d](https://x.y)"
    page.write_text(f"# One way\n{inside} {outside} [e](page.md#one-way) [f](page.md#none)")
    assert readme.broken_links(page) == ["#another", "gone.md", "page.md#none"]
    lines = readme.commands((ROOT / "README.md").read_text("utf-8"))
    for command in ("python train.py", "python sample.py"):
        assert any(line.startswith(command) for line in lines), command


# ---- the judge ---------------------------------------------------------------------------------
def test_an_exact_edit_is_a_success_and_an_untouched_picture_is_none():
    groups = evaluate.everything(1, 7)
    assert set(groups) == {*edits.EDITS, "never asked for", "unseen style"}
    for scene, kind, value, _ in sum(groups.values(), []):
        truth = scenes.render(edits.change(scene, kind, value))
        exact = evaluate.measure(scene, kind, value, truth)
        assert exact["success"] and exact["psnr_truth_db"] > 60, (kind, value)
        assert exact["preservation_db"] is None or exact["preservation_db"] > 40, (kind, value)
        copy = evaluate.measure(scene, kind, value, scenes.render(scene))
        assert not copy["success"], (kind, value)
        assert evaluate.summary([copy, exact])["failed"] == {copy["edit"]: [1, 2]}


def test_the_interval_is_that_of_a_mean():
    """Of a hundred coins: 0.5 +- 1.96 * 0.5 / 10."""
    low, high = evaluate.interval([0, 1] * 50)
    assert 0.38 < low < 0.45 and 0.55 < high < 0.62


@pytest.mark.parametrize("before, free", [("clear", True), ("rain", False)])
def test_where_flakes_begin_is_the_editors_choice_but_after_rain(before, free):
    """Every pixel is tried, not every second: at (5, 9) the truth is found exactly."""
    scene = scenes.sample_scene(np.random.default_rng(4), style="plain", weather=before)
    snow = edits.change(scene, "weather", "snowfall")

    def judged(picture):
        return evaluate.measure(scene, "weather", "snowfall", picture)

    for falls in (None, (4, 10), (5, 9), (12.6, 7.4)):
        read = judged(scenes.render(snow, falls=falls))
        assert read["success"] == (free or falls is None) and read["success_free"], falls
        if falls == (5, 9):
            assert (read["psnr_truth_db"] > 60) == free
    for weather in (before, "rain", "fog"):
        other = scenes.render(edits.change(scene, "weather", weather))
        assert not judged(other)["success_free"], weather


def test_where_the_moon_stands_is_open_after_sunset():
    """Where it stands far from the sun the strict reading fails."""
    fixed = {"style": "plain", "weather": "clear", "time": "sunset"}
    sun, elsewhere = (12.0, 12.0), (50.0, 9.0)
    scene = scenes.sample_scene(np.random.default_rng(4), **fixed, clouds=(), disc=sun)
    night = edits.change(scene, "time", "night")

    def judged(wish):
        return evaluate.measure(scene, "time", "night", scenes.render(wish))

    for disc in (sun, elsewhere):
        read = judged(replace(night, disc=disc))
        assert read["success"] == (disc == sun) and read["success_free"], disc
    house = edits.change(night, "house", "blue" if scene.house == "red" else "red")
    for other in (scene, house, edits.change(night, "weather", "fog")):
        assert not judged(other)["success_free"]


# ---- the general editor's world ----------------------------------------------------------------
def drawn_rows(folder, *options):
    done = call("tiny/edits.py", folder, *options)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "tuples.jsonl").read_text().splitlines()]


def test_the_general_editor_never_meets_what_is_kept_back(tmp_path):
    """Neither as instruction nor as undo, though the base knows the words; and the wordings of the
    examination are none of the training's."""
    rows = drawn_rows(tmp_path, "--n", 400)
    asked = {row[kind] for row in rows for kind in ("instr", "undo")}
    assert len(rows) == 400 and len(asked) > 60
    assert not {"autumn", "fall", "purple"} & set(" ".join(asked).split())
    assert not any(row["src"].startswith("a blueprint") for row in rows)
    for word in ("purple", "autumn"):
        assert any(word in row["src"] for row in rows)
    groups = evaluate.everything(40, 7).values()
    assert not asked & {instr for cases in groups for *_, instr in cases}
    for row in rows:
        changed = set(row["src"].split()) ^ set(row["tgt"].split())
        assert row["src"] != row["tgt"] and len(changed) <= 12, row


def test_more_snow_and_more_nights_may_be_asked_for(tmp_path):
    rows = drawn_rows(tmp_path, "--n", 300, "--snow", 0.4, "--night", 0.3)
    snow, night = ([row for row in rows if word in row["instr"]] for word in ("snow", "night"))
    assert 100 < len(snow) < 210 and not any("snow" in row["undo"] for row in snow)
    sunset = [row for row in night if "sunset" in row["undo"] or "dusk" in row["undo"]]
    assert 20 < len(sunset) < len(night)
