"""The embedded base's training. What only an accelerator does (bf16, workers, large batches) runs
here on the CPU; compiling is left out."""

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pretrain
import scenes
from frozen.load import load_base

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Runs a stage in a folder of the test's own."""

    def run(name, **options):
        options = {"work": tmp_path, "out": tmp_path / "out"} | options
        words = [f"--{key}={value}" for key, value in options.items()]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", name, *words])
        pretrain.main()

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    return run


def weights(folder):
    return [load_file(next((folder / part).glob("*.safetensors"))) for part in PARTS]


def test_pictures_do_not_depend_on_the_processes_that_draw_them(stage, tmp_path):
    stage("render", n=502)  # two parts
    drawn = np.load(tmp_path / "images.npy")
    assert len(drawn) == 502
    for i in (0, 499, 500, 501):
        scene = scenes.sample_scene(np.random.default_rng((0, i)))
        assert np.array_equal(drawn[i], scenes.render(scene))


def test_an_accelerators_way_from_nothing_to_a_base_that_loads(stage, tmp_path, monkeypatch):
    """The clock goes on by a second whenever it is read: as many steps on any machine."""
    clock = SimpleNamespace(time=itertools.count().__next__)
    monkeypatch.setattr(pretrain, "time", clock)
    monkeypatch.setattr(pretrain, "accelerated", lambda device: True)
    try:
        stage("all", n=40, minutes=0.5, batch=8)
    finally:
        torch.set_float32_matmul_precision("highest")
    saved = load_file(tmp_path / "flow.safetensors")
    assert saved["step"] > 1
    assert all(torch.isfinite(v).all() for v in saved.values())
    load_base(str(tmp_path / "out"))


def test_another_sitting_begins_with_the_committed_weights(stage, tmp_path):
    """Restored, loaded, saved and exported again they are the same, bit for bit."""
    stage("render", n=3)
    stage("restore")
    stage("flow", minutes=1e-9)  # no step
    stage("export")
    for ours, committed in zip(weights(tmp_path / "out"), weights(pretrain.CHECKPOINT)):
        assert ours.keys() == committed.keys()
        assert all(torch.equal(ours[k], committed[k]) for k in ours)


def test_texts_follow_their_scenes_and_one_in_ten_is_empty():
    """Read back through the vocabulary: no caption names another house colour."""
    tokenizer = load_base("tiny")[2].tokenizers[0]
    symbols = {number: symbol for symbol, number in tokenizer.vocab.items()}
    world = pretrain.records(range(50))
    pick, ids = next(iter(pretrain.Samples(world, [tokenizer], 2000)))
    empty = 0
    for scene, row in zip((world[i] for i in pick), ids.tolist()):
        words = {symbols[number].removesuffix("</w>") for number in row}
        colours = words & set(scenes.ATTRIBUTES["house"])
        wish = words & {"make", "turn", "change", "paint", "add", "put", "remove", "clear"}
        assert wish or colours <= {scene.house}
        empty += row[1] == tokenizer.end
    assert 120 < empty < 280
