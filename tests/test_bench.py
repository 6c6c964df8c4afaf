"""The measuring tools measure what they say."""

import dataclasses
import json
import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModelWithProjection


sys.path.insert(0, str(ROOT / "bench"))
from frozen.load import load_base  # noqa: E402
import evaluate  # noqa: E402
import readme  # noqa: E402
import speed  # noqa: E402
from memory import SD3, TEXTS, VAE_CONFIG, Meter, forward_tflop, other_memory, step_memory  # noqa: E402

import edits  # noqa: E402
import scenes  # noqa: E402
from model import MMDiT  # noqa: E402


def test_the_memory_meter_counts_what_is_alive_and_what_autograd_keeps():
    x = torch.zeros(1000, requires_grad=True)
    with Meter() as meter:
        y = x.exp()  # 4,000 bytes, kept for the gradient even when the name is gone
        z = (y + 1).sum()  # another 4,000, at once freed; a sum of 4
        assert (meter.peak, meter.now) == (8004, 4004)
        del y
        assert meter.now == 4004
        z.backward()
        assert x.grad is not None and meter.now == 4004  # y is freed, the gradient is there


def test_the_price_of_a_step_is_taken_with_the_options_of_today():
    with mock.patch.dict(speed.RECIPES["tiny"], batch=4, n=2):
        priced = speed.byg_step(load_base("tiny"), "tiny", 2)
    assert priced.keys() == {"step", "imitation", "mean", "rollout", "teacher"}


def test_checkpointing_saves_memory_and_weights_are_counted_exactly():
    config = SD3 | dict(num_layers=2, num_attention_heads=8, qk_norm="rms_norm")
    kept, again = (step_memory(config, 128, 1, 4, checkpointing=c) for c in (False, True))
    with torch.device("meta"):
        weights = sum(v.numel() for v in MMDiT(config).state_dict().values()) * 2 / 2**30
    assert again["peak"] < kept["peak"] and again["weights"] == kept["weights"] == pytest.approx(
        weights, abs=0.01
    )


def test_encoders_and_decoder_are_counted_too():
    size = lambda model, bytes: sum(v.numel() for v in model.state_dict().values()) * bytes / 2**30  # noqa: E731
    config = SD3 | dict(num_layers=2, num_attention_heads=8, qk_norm="rms_norm")
    with torch.device("meta"):
        theirs = AutoencoderKL(
            **VAE_CONFIG,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        )
        there = (
            size(MMDiT(config), 2)
            + size(theirs, 4)
            + sum(size(CLIPTextModelWithProjection(CLIPTextConfig(**c)), 2) for c in TEXTS)
        )
    some, more = (
        other_memory(config, 64, 4, held=n) for n in (1, 200)
    )  # 200 small pictures are still decoded 64 at a time
    assert some["decoder"] == pytest.approx(size(theirs.decoder, 4), abs=0.006)
    assert (
        there < some["encoding"] < there + 0.2
        and some["sheet"] < more["sheet"] < some["sheet"] * 64
    )


def test_operations_are_counted_as_by_hand():
    d, n, text, rank = 512, 256, 78, 4  # 256 pixels: 256 image tokens
    by_hand = (
        8 * (n + text) * 12 * d**2 * 2 + 8 * 4 * (n + text) ** 2 * d
    )  # projections and MLP, attention
    counted = (
        forward_tflop(
            SD3 | dict(num_layers=8, num_attention_heads=8, qk_norm="rms_norm"), 256, rank
        )
        * 1e12
    )
    assert counted == pytest.approx(
        by_hand, rel=0.1
    )  # the rest: embeddings, modulation, the adapter


def test_the_readme_leads_somewhere(tmp_path):
    assert readme.broken_links(ROOT / "README.md") == []
    (tmp_path / "page.md").write_text(
        "# One way\n[a](#one-way) [b](#another) [c](gone.md) [d](https://x.y) [e](page.md#one-way) [f](page.md#none)"
    )
    assert readme.broken_links(tmp_path / "page.md") == ["#another", "gone.md", "page.md#none"]
    lines = readme.commands((ROOT / "README.md").read_text())
    assert any(line.startswith("python train.py") for line in lines) and any(
        line.startswith("python sample.py") for line in lines
    )


def test_an_exact_edit_is_a_success_and_an_untouched_picture_is_none():
    groups = evaluate.everything(1, 7)
    assert set(groups) == {*edits.EDITS, "never asked for", "unseen style"}
    for cases in groups.values():
        for scene, kind, value, _ in cases:
            exact = evaluate.measure(
                scene, kind, value, scenes.render(edits.change(scene, kind, value))
            )
            assert (
                exact["success"]
                and exact["psnr_truth_db"] > 60
                and (exact["preservation_db"] or 99) > 40
            ), (kind, value, exact)
            copy = evaluate.measure(scene, kind, value, scenes.render(scene))
            assert not copy["success"] and evaluate.summary([copy, exact])["failed"] == {
                copy["edit"]: [1, 2]
            }, (kind, value)
    low, high = evaluate.interval([0, 1] * 50)
    assert 0.38 < low < 0.45 and 0.55 < high < 0.62  # +- 1.96 * .5 / 10


def test_where_flakes_begin_is_the_editors_choice_but_after_rain():
    for before, free in (("clear", True), ("rain", False)):
        scene = scenes.sample_scene(scenes.np.random.default_rng(4), style="plain", weather=before)
        snow = edits.change(scene, "weather", "snowfall")
        for falls, right in ((None, True), ((4, 10), free), ((5, 9), free), ((12.6, 7.4), free)):
            read = evaluate.measure(scene, "weather", "snowfall", scenes.render(snow, falls=falls))
            assert read["success"] == right and read["success_free"], (before, falls)
            assert (
                falls != (5, 9) or (read["psnr_truth_db"] > 60) == free
            )  # every pixel is tried, not every second
        for other in (
            scene,
            edits.change(scene, "weather", "rain"),
            edits.change(scene, "weather", "fog"),
        ):
            assert not evaluate.measure(scene, "weather", "snowfall", scenes.render(other))[
                "success_free"
            ]


def test_where_the_moon_stands_is_open_after_sunset():
    scene = scenes.sample_scene(
        scenes.np.random.default_rng(4),
        style="plain",
        weather="clear",
        time="sunset",
        clouds=(),
        disc=(12.0, 12.0),
    )
    night = edits.change(scene, "time", "night")
    for disc, right in (
        ((12.0, 12.0), True),
        ((50.0, 9.0), False),
    ):  # not everywhere does the strict reading fail
        read = evaluate.measure(
            scene, "time", "night", scenes.render(dataclasses.replace(night, disc=disc))
        )
        assert read["success"] == right and read["success_free"], disc
    for other in (
        scene,
        edits.change(night, "house", "red" if scene.house != "red" else "blue"),
        edits.change(night, "weather", "fog"),
    ):
        assert not evaluate.measure(scene, "time", "night", scenes.render(other))["success_free"]


def test_the_general_editor_never_meets_what_is_kept_back(tmp_path):
    """Neither as instruction nor as undo; and the wordings of the examination are none of the training's."""
    subprocess.run([sys.executable, "tiny/edits.py", tmp_path, "--n", "400"], cwd=ROOT, check=True)
    rows = [json.loads(line) for line in (tmp_path / "tuples.jsonl").read_text().splitlines()]
    asked = {row[k] for row in rows for k in ("instr", "undo")}
    assert len(rows) == 400 and len(asked) > 60
    assert not {"autumn", "fall", "purple"} & {word for text in asked for word in text.split()}
    assert not any(row["src"].startswith("a blueprint") for row in rows)
    assert any("purple" in row["src"] for row in rows) and any(
        "autumn" in row["src"] for row in rows
    )  # the base's own words
    examined = {instr for group, cases in evaluate.everything(40, 7).items() for *_, instr in cases}
    assert not asked & examined
    for row in rows:
        a, b = row["src"].split(), row["tgt"].split()
        assert row["src"] != row["tgt"] and len(set(a) ^ set(b)) <= 12, row
    subprocess.run(
        [
            sys.executable,
            "tiny/edits.py",
            tmp_path / "more",
            "--n",
            "300",
            "--snow",
            ".4",
            "--night",
            ".3",
        ],
        cwd=ROOT,
        check=True,
    )
    rows = [
        json.loads(line) for line in (tmp_path / "more" / "tuples.jsonl").read_text().splitlines()
    ]
    snow, night = ([row for row in rows if word in row["instr"]] for word in ("snow", "night"))
    assert (
        100 < len(snow) < 210
        and not any("snow" in row["undo"] for row in snow)
        and all(row["own_noise"] for row in snow)
    )
    sunset = [
        row for row in night if "sunset" in row["undo"] or "dusk" in row["undo"]
    ]  # the moon is not where the sun was
    assert 20 < len(sunset) < len(night) and all(
        row["own_noise"] == (row in sunset) for row in night
    )
