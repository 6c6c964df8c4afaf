"""The two commands as a user runs them, on the embedded base: the main job in small, and every kind
of bad input."""

import fcntl
import json
import os
import pathlib
import re
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, WINTER, call, read_log
from evaluate import measure
from PIL import Image
from safetensors.torch import load_file

import scenes
from data import encode, read_prompts
from files import run
from files.disk import read_tensors, write_tensors
from files.folder import find
from frozen.load import load_base
from frozen.vae import to_images
from model import new_adapter
from routing import noise, time_grid
from sample import edit

# train.py, interrupted in its third step
INTERRUPTED = """if True:
    import os, signal, sys, train
    set_rate = train.set_rate
    def interrupted(opt, step, recipe):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return set_rate(opt, step, recipe)
    train.set_rate = interrupted
    sys.argv = sys.argv[1:]
    train.main()
"""


@pytest.fixture(scope="module")
def trained(few, tmp_path_factory):
    """-> a run of four steps and the command that made it, but for --out"""
    out = tmp_path_factory.mktemp("run") / "out"
    command = ["train.py", "--data", few, *WINTER, *SHORT, "--steps", 4]
    done = call(*command, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, command


def same_state(a, b):
    a, b = (load_file(out / "checkpoint.safetensors") for out in (a, b))
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


# ---- training ----------------------------------------------------------------------------------
def test_training_leaves_everything(trained, few):
    out, _ = trained
    for name in (
        *("adapter.safetensors", "checkpoint.safetensors", "config.json", "log.jsonl"),
        *("README.md", "index.html", "samples/000000.png", "samples/000004.png"),
    ):
        assert (out / name).exists(), name
    assert [line["step"] for line in read_log(out)] == [1, 2, 3, 4]


def test_every_picture_is_undone_towards_its_own_season(trained, few):
    lines = map(json.loads, (few / "metadata.jsonl").read_text().splitlines())
    captions = {line["file_name"]: line["text"].replace("fall", "autumn") for line in lines}
    held = json.loads((trained[0] / "config.json").read_text())["held"]
    seasons = {row["path"]: row["undo"].removeprefix("make it ") for row in held}
    assert len(set(seasons.values())) > 1
    for path, season in seasons.items():
        assert re.search(rf"\b{season}\b", captions[pathlib.Path(path).name])


def test_an_interrupted_run_ends_its_step_and_goes_on_exactly(trained, tmp_path):
    """Against the run that was never stopped; --resume needs no option but --data and --out, whose
    config.json has the others."""
    (whole, command), out = trained, tmp_path / "out"
    halted = call("-c", INTERRUPTED, *command, "--out", out)
    assert halted.returncode == 130, halted.stderr
    assert [line["step"] for line in read_log(out)] == [1, 2, 3]
    with open(out / "log.jsonl", "a") as log:  # as a kill between two saves would leave it: torn
        log.write('{"step": 4, "lr": 0.1}\n{"step": 5, "l')
    resumed = call("train.py", "--data", command[2], "--out", out, "--resume")
    assert resumed.returncode == 0 and "begun with" not in resumed.stderr, resumed.stderr
    assert [line["step"] for line in read_log(out)] == [1, 2, 3, 4]
    assert same_state(whole, out)


def test_a_run_that_began_with_another_editor_goes_on_with_its_rank_and_gate(few, tmp_path):
    """The bundled editor is of another rank than the recipe, and its file is an old one."""
    out, command = tmp_path / "o", ["train.py", "--data", few, *WINTER, *SHORT[:-2]]
    shapes = []
    for more in (("--init", "tiny/editor", "--steps", 1), ("--steps", 2, "--resume")):
        done = call(*command, "--out", out, *more)
        assert done.returncode == 0, done.stderr
        tensors, _ = read_tensors(out / "adapter.safetensors")
        shapes.append({key: v.shape for key, v in tensors.items()})
    assert shapes[0] == shapes[1]


def test_the_papers_cue_and_noised_sources_train_too(few, tmp_path):
    command = ["train.py", "--data", few, *WINTER, *SHORT, "--steps", 1, "--out", tmp_path / "o"]
    done = call(*command, "--cue", "cosine", "--no-bootstrap")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "o/config.json").read_text())["routing"] == "onestep"
    assert -1 <= read_log(tmp_path / "o")[0]["cos"] <= 1


def test_a_run_is_neither_overwritten_nor_shared_nor_mistaken(trained, tmp_path, refusal):
    """No second run in its folder, no second process, no other optimizer, no other pictures
    unsaid, and no --resume of nothing."""
    (out, command), copy = trained, tmp_path / "out"
    shutil.copytree(out, copy)
    code, said = refusal(*command, "--out", copy)
    assert code == 2 and "holds a run already" in said
    assert same_state(out, copy)
    with open(copy / ".lock", "w") as lock:  # as a second process would hold it
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, said = refusal(*command, "--out", copy, "--resume")
        assert code == 2 and "another process is training" in said
    other = call(*command, "--out", copy, "--resume", "--recipe", "paper")
    assert other.returncode == 1 and "another optimizer" in other.stderr
    assert "Traceback" not in other.stderr
    other = call(*command, "--out", copy, "--resume", "--instr", "make it night")
    assert other.returncode == 0, other.stderr
    assert "not the pictures and prompts that the run" in other.stderr
    code, said = refusal(*command, "--out", tmp_path / "new", "--resume")
    assert code == 2 and "holds no run to resume" in said


def test_a_run_inside_its_data_goes_on_with_its_own_size_and_without_its_pictures(tmp_path):
    """Pictures of 9 x 12 pixels, one of them broken; the size is no whole number of patches."""
    for i in range(3):
        Image.fromarray(np.full((9, 12, 3), 80 * i, np.uint8)).save(tmp_path / f"{i}.PNG")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    command = ["train.py", "--data", tmp_path, *WINTER, "--base", "tiny", "--out", tmp_path / "o"]
    short = ["--steps", 1, "--batch", 1, "--n", 1, "--rank", 2, "--size", "48x144"]
    done = call(*command, *short)
    assert done.returncode == 0 and "skipped" in done.stderr, done.stderr
    config = (tmp_path / "o/config.json").read_text()
    assert json.loads(config)["size"] == [40, 112]
    done = call(*command, "--resume")
    assert done.returncode == 0 and "4 images" in done.stderr, done.stderr
    assert "begun with" not in done.stderr
    assert json.loads((tmp_path / "o/config.json").read_text())["size"] == [40, 112]


@torch.no_grad()
def test_a_sheets_edit_is_the_edit_of_sample(few, tmp_path, monkeypatch):
    """What is on the sheet, as pixels, against sample.edit of the same sources, words and noise."""
    columns = []
    monkeypatch.setattr(run, "write_sheets", lambda path, shown, frames: columns.extend(shown))
    monkeypatch.setattr(run, "write_image", lambda *_: None)
    model, vae, text, shift = load_base("tiny")
    rows = read_prompts(few, find(few)[0], "make it winter")[:3]
    data = encode(rows, (64, 64), 1, vae, text, "cpu")
    adapter = {name: v + 0.02 * torch.randn_like(v) for name, v in new_adapter(model, 4).items()}
    held, ts = torch.tensor([2, 0]), time_grid(3, shift)
    run.sheet(tmp_path, model, vae, adapter, data, held, (1, 1, ts, nullcontext()), 0)  # one each
    x = torch.cat([data.latents[2], data.latents[0]])
    eps = noise(2, 1, x.shape[1:], torch.Generator().manual_seed(1))
    y = edit(model, adapter, x, text([rows[i]["instr"] for i in (2, 0)]), eps, ts)
    undone = edit(model, adapter, y, text([rows[i]["undo"] for i in (2, 0)]), eps, ts)
    for shown, latents in zip(columns, (x, y, undone), strict=True):
        assert np.abs(shown.astype(int) - to_images(vae.decode(latents))).max() <= 1


def test_editors_have_a_mean(trained, tmp_path, refusal):
    """tiny/mean.py against the sum by hand; in half precision, too, and sample.py takes it."""
    a, b, mean, half = trained[0], *(tmp_path / name for name in ("b", "mean", "half"))
    shutil.copytree(a, b)
    tensors, meta = read_tensors(a / "adapter.safetensors")
    other = {key: v + 0.01 * torch.randn_like(v) for key, v in tensors.items()}
    write_tensors(b / "adapter.safetensors", other, **meta)
    made = call("tiny/mean.py", a, b, "--out", mean)
    assert made.returncode == 0, made.stderr
    assert call("tiny/mean.py", mean, "--out", half, "--half").returncode == 0
    exact, short = (load_file(out / "adapter.safetensors") for out in (mean, half))
    assert exact.keys() == short.keys() == tensors.keys()
    for key, v in exact.items():
        torch.testing.assert_close(v, (tensors[key] + other[key]) / 2, rtol=0, atol=1e-6)
        assert short[key].dtype == torch.float16
        torch.testing.assert_close(short[key].float(), v, rtol=1e-3, atol=1e-6)
    assert call("sample.py", "--run", half, "--output", tmp_path / "s.png").returncode == 0
    code, said = refusal("tiny/mean.py", a, "--out", mean)
    assert code == 2 and "exists already" in said


# ---- editing -----------------------------------------------------------------------------------
def test_sample_edits_what_was_held_back(trained, tmp_path):
    done = call("sample.py", "--run", trained[0], "--output", tmp_path / "s.png")
    assert done.returncode == 0 and str(tmp_path / "s.png") in done.stdout, done.stderr
    assert Image.open(tmp_path / "s.png").width > 3 * 64


def test_a_held_back_picture_that_is_gone_is_left_out(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    gone = next((tmp_path / "run/held/0").iterdir())
    gone.unlink()
    done = call(
        "sample.py", "--run", tmp_path / "run", "--steps", 1, "--output", tmp_path / "s.png"
    )
    assert done.returncode == 0 and f"skipped {gone}" in done.stderr


def test_sample_edits_photographs_of_any_size_and_mode_each_under_its_own_name(trained, tmp_path):
    from skimage import data as photos

    inputs, edited = tmp_path / "in", tmp_path / "edited"
    inputs.mkdir()
    astronaut, camera = map(Image.fromarray, (photos.astronaut(), photos.camera()))
    astronaut.save(inputs / "astronaut.png")
    astronaut.convert("CMYK").save(inputs / "cmyk.jpg")
    camera.save(inputs / "camera.png")
    camera.save(inputs / "camera.jpg")  # a namesake
    Image.fromarray(photos.coffee()[:50]).save(inputs / "coffee.png")
    Image.fromarray(photos.coffee()[:25, :130]).save(inputs / "narrow.png")  # wider than the base
    Image.fromarray(photos.coffee()[:50, :61]).save(inputs / "small.png")  # comes out as it is
    command = ["sample.py", "--run", trained[0], "--input", inputs, *WINTER, "--steps", 2]
    done = call(*command, "--output", edited)
    assert done.returncode == 0 and "knows only its own world" in done.stderr, done.stderr
    names = {"astronaut.png", "camera.png", "camera.png.png", "coffee.png", "cmyk.png"}
    assert {path.name for path in edited.iterdir()} == names | {"narrow.png", "small.png"}
    sizes = {name: Image.open(edited / f"{name}.png").size for name in ("small", "astronaut")}
    assert sizes == {"small": (61, 50), "astronaut": (64, 64)}
    assert "512x512 pixels edited at 64x64" in done.stderr


def test_an_editor_of_pictures_takes_a_clip_frame_by_frame(trained, tmp_path):
    command = ["sample.py", "--run", trained[0], "--input", "tiny/clips/000.webp", "--steps", 1]
    done = call(*command, "--output", tmp_path / "clip")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "clip").iterdir())) == 12


ASKED = [  # in wordings that the bundled editor was not trained on
    ("house", "blue", "red", "change the house to red"),
    ("season", "winter", "summer", "make it look like summer"),
    ("time", "day", "night", "change the time to night"),
]


def test_before_any_training_sample_edits_with_the_bundled_editor(tmp_path):
    """Most of its edits must be what the renderer says, and nothing else changed."""
    rng, right = np.random.default_rng(7), []
    for kind, now, value, instr in ASKED:
        (tmp_path / kind).mkdir()
        cases = []
        for i in range(4):
            scene = scenes.sample_scene(rng, style="plain", weather="clear", **{kind: now})
            Image.fromarray(scenes.render(scene)).save(tmp_path / kind / f"{i}.png")
            cases.append(scene)
        command = [ROOT / "sample.py", "--input", kind, "--instr", instr, "--output", f"{kind}-out"]
        done = call(*command, cwd=tmp_path)
        assert done.returncode == 0 and "bundled editor" in done.stderr, done.stderr
        for i, scene in enumerate(cases):
            edited = np.asarray(Image.open(tmp_path / f"{kind}-out" / f"{i}.png"))
            right.append(measure(scene, kind, value, edited)["success"])
    assert sum(right) >= 9, right


def test_an_edit_is_unguided_if_nothing_else_is_asked(tmp_path):
    command = ["sample.py", "--run", "tiny/editor", "--input", "tiny/examples/000.png", *WINTER]
    pictures = []
    for words in ((), ("--guidance", 1), ("--guidance", 2)):
        out = tmp_path / f"{len(pictures)}.png"
        done = call(*command, "--steps", 2, *words, "--output", out)
        assert done.returncode == 0, done.stderr
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


# ---- bad input ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Folders: empty, of text alone, of three pictures and a broken one."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("empty", "text", "mixed"):
        (folder / name).mkdir()
    (folder / "text/notes.md").write_text("no image")
    (folder / "mixed/bad.png").write_bytes(b"not a picture")
    for i in range(3):
        Image.new("RGB", (12, 9)).save(folder / "mixed" / f"{i}.PNG")
    return folder


TRAIN = "train.py --base tiny --out {bad}/o --instr winter --data tiny/examples "
SAMPLE = "sample.py --run {run} "
REFUSED = [
    (TRAIN + "--data {bad}/empty", 1, "holds no images"),
    (TRAIN + "--data {bad}/text", 1, "holds no images"),
    (TRAIN + "--data {bad}/absent", 2, "is not a folder"),
    ("train.py --base tiny --out {bad}/o --data tiny/examples", 2, "no instruction"),
    ("train.py --base tiny --out {bad}/o", 2, "the following arguments are required: --data"),
    (TRAIN + "--base nonsense --out {bad}/p", 2, "unknown base"),
    (TRAIN + "--out /proc/out", 1, "cannot be written to"),
    (TRAIN + "--batch 0", 2, "--batch must be above 0, not 0"),
    (TRAIN + "--steps 0", 2, "--steps must be above 0"),
    (TRAIN + "--rank -1", 2, "--rank must be above 0"),
    (TRAIN + "--lr 0", 2, "--lr must be above 0"),
    (TRAIN + "--every 0", 2, "--every must be above 0"),
    (TRAIN + "--cue anchor", 2, "invalid choice: 'anchor'"),
    (TRAIN + "--frames 0", 2, "--frames must be above 0"),
    (TRAIN + "--frames 4", 2, "tiny/examples holds pictures, no clips"),
    (TRAIN + "--size wide", 2, "--size: invalid pixels value: 'wide'"),
    (TRAIN + "--size 8", 2, "--size: invalid pixels value: '8'"),
    (TRAIN + "--data {bad}/mixed --out {bad}/q --src {long}", 1, "4 of 4 target captions"),
    ("sample.py --run {bad}/nothing", 2, "no trained adapter"),
    (SAMPLE + "--steps 0", 2, "--steps must be above 0"),
    (SAMPLE + "--guidance nan", 2, "--guidance must be 0 or more"),
    (SAMPLE + "--input {bad}/absent.png", 2, "no such file"),
    (SAMPLE + "--input {bad}/mixed --output {bad}/mixed", 2, "would overwrite the input"),
    (SAMPLE + "--input {bad}/mixed/bad.png", 1, "cannot be read as an image"),
]


@pytest.mark.parametrize("line, code, words", REFUSED, ids=[words for *_, words in REFUSED])
def test_bad_input_gets_one_sentence_and_the_right_code(line, code, words, trained, bad, refusal):
    places = {"{bad}": str(bad), "{run}": str(trained[0]), "{long}": "a house " * 15}
    args = line.split()
    for name, place in places.items():
        args = [arg.replace(name, place) for arg in args]
    ended, said = refusal(*args)
    assert ended == code and words in said, said
    assert said.strip().splitlines()[-1].startswith(args[0])


def test_a_batch_that_the_ranks_cannot_share_evenly_is_refused(tmp_path):
    ranks = {"RANK": "0", "WORLD_SIZE": "2"}
    command = ["train.py", "--data", "tiny/examples", *WINTER, "--base", "tiny", "--batch", 7]
    command += ["--out", tmp_path / "out"]
    done = call(*command, env=os.environ | ranks)
    assert done.returncode == 2 and "cannot be shared evenly by 2 ranks" in done.stderr
    assert "Traceback" not in done.stderr
