"""The two commands as a user runs them, on the embedded base: the main job in small, and every kind of bad input."""

import fcntl
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
from evaluate import measure, own_guidance, scenes  # noqa: E402


def call(*args, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    done = call(
        "train.py",
        "--data",
        "tiny/examples",
        "--instr",
        "make it winter",
        "--base",
        "tiny",
        "--out",
        out,
        "--steps",
        4,
        "--identity-first",
        2,
        "--identity-share",
        1,
        "--batch",
        4,
        "--n",
        2,
        "--views",
        2,
        "--cache",
        out.parent / "latents",
    )
    assert done.returncode == 0, done.stderr
    return out


def test_training_leaves_everything(out):
    assert len(list((out.parent / "latents").iterdir())) == 256
    for name in (
        "adapter.safetensors",
        "config.json",
        "log.jsonl",
        "README.md",
        "checkpoint.safetensors",
        "samples/000000.png",
        "samples/000004.png",
    ):
        assert (out / name).exists(), name
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
    ]
    captions = {
        row["file_name"]: row["text"]
        for row in map(json.loads, (ROOT / "tiny/examples/metadata.jsonl").read_text().splitlines())
    }
    held = json.loads((out / "config.json").read_text())["held"]
    assert len({row["undo"] for row in held}) > 1  # every picture is undone towards its own season
    for row in held:
        assert row["undo"].removeprefix("make it ") in re.sub(
            r"\bfall\b", "autumn", captions[pathlib.Path(row["path"]).name]
        )


def test_resume_goes_on_exactly(out, tmp_path):
    common = [
        "train.py",
        "--data",
        "tiny/examples",
        "--instr",
        "make it winter",
        "--base",
        "tiny",
        "--out",
        tmp_path / "b",
        "--identity-first",
        2,
        "--identity-share",
        1,
        "--batch",
        4,
        "--n",
        2,
        "--views",
        2,
        "--steps",
        4,
    ]
    code = (
        "import sys, signal, os, losses; n = [0]\nimport train; f = train.identity_loss\n"
        "def stop(*a):\n    n[0] += 1\n    if n[0] == 3: os.kill(os.getpid(), signal.SIGINT)\n    return f(*a)\n"
        "train.identity_loss = stop; sys.argv = sys.argv[1:]; train.main()"
    )
    halted = subprocess.run(
        [sys.executable, "-c", code, *map(str, common)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert halted.returncode == 130, halted.stderr
    assert call(*common).returncode == 2  # nothing is overwritten without --resume
    with open(
        tmp_path / "b/log.jsonl", "a"
    ) as log:  # a kill between save and save leaves later lines, the last one torn
        log.write('{"step": 4, "lr": 0.1}\n{"step": 5, "l')
    with open(tmp_path / "b/.lock", "w") as lock:  # as a second process would hold it
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = call(*common, "--resume")
        assert refused.returncode == 2 and "another process is training" in refused.stderr
    other = call(*common, "--resume", "--no-muon")
    assert (
        other.returncode == 1
        and "another optimizer" in other.stderr
        and "Traceback" not in other.stderr
    )
    done = call(
        "train.py",
        "--data",
        "tiny/examples",
        "--instr",
        "make it winter",
        "--out",
        tmp_path / "b",
        "--resume",
    )  # has the run's options
    assert done.returncode == 0 and "begun with" not in done.stderr, done.stderr
    assert [
        json.loads(line)["step"] for line in (tmp_path / "b/log.jsonl").read_text().splitlines()
    ] == [1, 2, 3, 4]
    a, b = (
        load_file(out / "checkpoint.safetensors"),
        load_file(tmp_path / "b" / "checkpoint.safetensors"),
    )
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
    other = call(
        "train.py",
        "--data",
        "tiny/examples",
        "--instr",
        "make it night",
        "--out",
        tmp_path / "b",
        "--resume",
    )
    assert other.returncode == 0 and "not the pictures and prompts that the run" in other.stderr, (
        other.stderr
    )


def test_an_edit_may_ask_for_its_states_own_noise_and_editors_have_a_mean(tmp_path):
    """`own_noise` in tuples.jsonl changes the teacher's cue and nothing else; tiny/mean.py against the sum by hand."""
    first = {}
    for name in ("fresh", "own"):
        folder = tmp_path / name
        folder.mkdir()
        lines = [
            {
                "file_name": f"{i:03d}.png",
                "src": "a house in summer",
                "tgt": "a house in snowfall",
                "instr": "make it snowy",
                "undo": "make it clear",
            }
            | ({"own_noise": True} if name == "own" else {})
            for i in range(4)
        ]
        for line in lines:
            shutil.copy(ROOT / "tiny/examples" / line["file_name"], folder)
        (folder / "tuples.jsonl").write_text("\n".join(map(json.dumps, lines)))
        done = call(
            "train.py",
            "--data",
            folder,
            "--base",
            "tiny",
            "--out",
            folder / "out",
            "--steps",
            2,
            "--imitate",
            0,
            "--identity-first",
            0,
            "--identity-share",
            1,
            "--batch",
            4,
            "--n",
            2,
            "--views",
            1,
            "--held",
            1,
            "--warmup",
            1,
            "--rank",
            4,
        )
        assert done.returncode == 0, done.stderr
        first[name] = json.loads((folder / "out/log.jsonl").read_text().splitlines()[0])
    assert (
        all(first["own"][k] == first["fresh"][k] for k in ("cycle", "identity"))
        and first["own"]["prior"] != first["fresh"]["prior"]
    )
    made = call(
        "tiny/mean.py", tmp_path / "fresh/out", tmp_path / "own/out", "--out", tmp_path / "mean"
    )
    assert made.returncode == 0, made.stderr
    a, b, mean = (
        load_file(tmp_path / run / "adapter.safetensors")
        for run in ("fresh/out", "own/out", "mean")
    )
    assert a.keys() == mean.keys() and all(
        ((a[k] + b[k]) / 2 - mean[k]).abs().max() < 1e-6 for k in a
    )
    assert any(not a[k].equal(b[k]) for k in a)
    assert (
        call("sample.py", "--run", tmp_path / "mean", "--output", tmp_path / "s.png").returncode
        == 0
    )
    assert (
        call("tiny/mean.py", tmp_path / "mean", "--out", tmp_path / "half", "--half").returncode
        == 0
    )
    half = load_file(tmp_path / "half/adapter.safetensors")
    size = [(tmp_path / run / "adapter.safetensors").stat().st_size for run in ("half", "mean")]
    assert (
        all((half[k] - mean[k]).abs().max() <= 1e-3 * mean[k].abs().max() for k in mean)
        and size[0] < 0.6 * size[1]
    )
    assert (
        call("sample.py", "--run", tmp_path / "half", "--output", tmp_path / "s.png").returncode
        == 0
    )
    again = call("tiny/mean.py", tmp_path / "fresh/out", "--out", tmp_path / "mean")
    assert again.returncode == 2 and "exists already" in again.stderr


def test_sample_edits_the_held_back_and_anything_else(out, tmp_path):
    assert call("sample.py", "--run", out, "--output", tmp_path / "s.png").returncode == 0
    from skimage import data as photos

    for name, photo in (
        ("astronaut", photos.astronaut()),
        ("camera", photos.camera()),
        ("coffee", photos.coffee()[:50]),
    ):
        Image.fromarray(photo).save(tmp_path / f"{name}.png")
    Image.fromarray(photos.astronaut()).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(photos.camera()).save(tmp_path / "camera.jpg")  # a namesake
    done = call(
        "sample.py",
        "--run",
        out,
        "--input",
        tmp_path,
        "--instr",
        "make it winter",
        "--output",
        tmp_path / "edited",
    )
    assert done.returncode == 0 and "knows only its own world" in done.stderr
    assert {p.name for p in (tmp_path / "edited").iterdir()} == {
        "s.png",
        "astronaut.png",
        "camera.png",
        "camera.png.png",
        "coffee.png",
        "cmyk.png",
    }
    done = call(
        "sample.py",
        "--run",
        out,
        "--input",
        "tiny/clips/000.webp",
        "--steps",
        2,
        "--output",
        tmp_path / "clip",
    )
    assert done.returncode == 0 and len(list((tmp_path / "clip").iterdir())) == 12, (
        done.stderr
    )  # frame by frame


def test_before_any_training_sample_edits_with_the_editor_that_comes_along(tmp_path):
    """Most of these edits must be what the renderer says: nothing else changes, in wordings that the editor was not trained on."""
    rng, asked = np.random.default_rng(7), []
    for kind, now, value, instr in (
        ("house", "blue", "red", "change the house to red"),
        ("season", "winter", "summer", "make it look like summer"),
        ("time", "day", "night", "change the time to night"),
    ):
        (tmp_path / "in" / kind).mkdir(parents=True)
        for j in range(4):
            scene = scenes.sample_scene(rng, style="plain", weather="clear", **{kind: now})
            Image.fromarray(scenes.render(scene)).save(tmp_path / "in" / kind / f"{j}.png")
            asked.append((tmp_path / kind / f"{j}.png", scene, kind, value))
        done = call(
            ROOT / "sample.py",
            "--input",
            f"in/{kind}",
            "--instr",
            instr,
            "--output",
            kind,
            cwd=tmp_path,
        )
        assert done.returncode == 0 and "comes along" in done.stderr, done.stderr
    right = [measure(*edit, np.asarray(Image.open(path)))["success"] for path, *edit in asked]
    assert sum(right) >= 9, right


def test_an_editor_of_many_instructions_is_guided_if_nothing_else_is_asked(tmp_path):
    pictures = []
    for words in ((), ("--guidance", 1.5), ("--guidance", 1)):
        done = call(
            "sample.py",
            "--run",
            "tiny/editor",
            "--input",
            "tiny/examples/000.png",
            "--instr",
            "make it winter",
            "--steps",
            4,
            *words,
            "--output",
            tmp_path / "edited.png",
        )
        assert done.returncode == 0, done.stderr
        pictures.append((tmp_path / "edited.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2] and own_guidance("make it winter") == 1


def test_bad_input_gets_one_sentence_and_the_right_code(tmp_path, out):
    empty, text, mixed = (tmp_path / n for n in ("empty", "text", "mixed"))
    for folder in (empty, text, mixed):
        folder.mkdir()
    (text / "notes.md").write_text("no image")
    (mixed / "bad.png").write_bytes(b"not a picture")
    for i in range(3):
        Image.fromarray(np.full((9, 12, 3), 80 * i, np.uint8)).save(mixed / f"{i}.PNG")
    winter = ["--instr", "make it winter", "--out", tmp_path / "o", "--base", "tiny"]
    for args, code, words in (
        (["train.py", "--data", empty, *winter], 1, "holds no images"),
        (["train.py", "--data", text, *winter], 1, "holds no images"),
        (["train.py", "--data", tmp_path / "absent", *winter], 2, "is not a folder"),
        (
            ["train.py", "--data", "tiny/examples", "--out", tmp_path / "o", "--base", "tiny"],
            2,
            "no instruction",
        ),
        (["train.py", "--data", "tiny/examples", *winter[:-1], "nonsense"], 2, "unknown base"),
        (
            [
                "train.py",
                "--data",
                "tiny/examples",
                *winter[:2],
                "--base",
                "tiny",
                "--out",
                "/proc/out",
            ],
            1,
            "cannot be written to",
        ),
        (
            ["train.py", "--data", "tiny/examples", *winter, "--batch", 7],
            2,
            "cannot be shared evenly",
        ),
        (
            ["train.py", "--data", "tiny/examples", *winter, "--imitate", 150],
            2,
            "--imitate must lie between 0 and 1",
        ),
        (
            ["train.py", "--data", "tiny/examples", *winter, "--imitate", 1, "--cue", "cosine"],
            2,
            "--imitate needs --cue delta",
        ),
        (
            ["train.py", "--data", "tiny/examples", *winter, "--weight-decay", -1],
            2,
            "--weight-decay must lie between 0 and 1",
        ),
        (
            ["train.py", "--data", "tiny/examples", *winter, "--recipe", "paper", "--antithetic"],
            2,
            "--antithetic needs --cue delta",
        ),
        (
            ["train.py", "--data", mixed, *winter, "--src", "a house " * 15],
            1,
            "3 of 3 target captions read like their source's",
        ),
        (["sample.py", "--run", tmp_path / "nothing"], 2, "no trained adapter"),
        (["sample.py", "--run", out, "--steps", 0], 2, "--steps must be above 0"),
        (["sample.py", "--run", out, "--guidance", "nan"], 2, "--guidance must be 0 or more"),
        (["sample.py", "--run", out, "--input", tmp_path / "absent.png"], 2, "no such file"),
        (
            ["sample.py", "--run", out, "--input", mixed, "--output", mixed],
            2,
            "would overwrite the input",
        ),
        (
            ["sample.py", "--run", out, "--input", mixed / "bad.png"],
            1,
            "cannot be read as an image",
        ),
    ):
        done = call(*args)
        assert (
            done.returncode == code and words in done.stderr and "Traceback" not in done.stderr
        ), (args, done.stderr)
        assert done.stderr.strip().splitlines()[-1].startswith(args[0])
    inside = [
        *winter[:2],
        "--base",
        "tiny",
        "--out",
        mixed / "o",
    ]  # its pictures are no data when it goes on
    done = call(
        "train.py",
        "--data",
        mixed,
        *inside,
        "--steps",
        1,
        "--batch",
        1,
        "--states",
        1,
        "--size",
        "48x144",
    )
    assert done.returncode == 0 and "skipped" in done.stderr
    assert json.loads((mixed / "o/config.json").read_text())["size"] == [40, 112]
    done = call("train.py", "--data", mixed, *inside, "--resume")
    assert done.returncode == 0 and "4 images" in done.stderr and "begun with" not in done.stderr, (
        done.stderr
    )
    assert json.loads((mixed / "o/config.json").read_text())["size"] == [40, 112]
    done = call("train.py", "--data", mixed, *winter, "--size", "wide")
    assert done.returncode == 2 and "--size" in done.stderr
