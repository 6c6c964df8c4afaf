"""Clips: attention over frames, what is read and written, training and editing on them."""

import json
import shutil
import struct
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

import data
import scenes
from files.clips import read_frames, windows, write_clip  # noqa: E402
from files.disk import UserError  # noqa: E402
from model import MMDiT, new_adapter, temporal
from routing import steady


def call(*args):
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=280
    )


def test_temporal_attention_is_what_its_formula_says():
    d, w, frames = 64, 32, 5
    x, part = (
        torch.randn(2 * frames, 3, d),
        {"temporal.qkv.weight": torch.randn(3 * w, d), "temporal.out.weight": torch.randn(d, w)},
    )
    y = temporal(x, frames, part)
    q_w, k_w, v_w = part["temporal.qkv.weight"].chunk(3)
    angles = np.arange(frames)[:, None] * 1000 ** (-np.arange(d // 2) / (d // 2))
    place = torch.tensor(np.concatenate([np.sin(angles), np.cos(angles)], 1), dtype=torch.float)
    for clip in range(2):
        for n in range(3):
            h = x[clip * frames : (clip + 1) * frames, n]
            u = (h - h.mean(-1, keepdim=True)) / (
                h.var(-1, unbiased=False, keepdim=True) + 1e-6
            ).sqrt()
            a = ((u + place) @ q_w.T @ k_w @ (u + place).T / w**0.5).softmax(-1)
            want = h + (a @ u - u) @ v_w.T @ part["temporal.out.weight"].T
            torch.testing.assert_close(
                y[clip * frames : (clip + 1) * frames, n], want, rtol=1e-3, atol=1e-3
            )


def test_one_frame_and_a_fresh_adapter_are_the_image_path_bit_for_bit():
    torch.manual_seed(0)
    model = MMDiT(
        dict(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            qk_norm="rms_norm",
            joint_attention_dim=24,
            pooled_projection_dim=12,
            pos_embed_max_size=8,
        )
    ).requires_grad_(False)
    x, source, prompt = (
        torch.randn(6, 4, 8, 8),
        torch.randn(6, 4, 8, 8),
        (torch.randn(6, 5, 20), torch.randn(6, 12)),
    )
    adapter = new_adapter(model, 4, video=True)
    run = lambda frames, a=adapter: model(x, torch.full((6,), 0.5), prompt, source, a, frames)  # noqa: E731
    assert run(3).equal(run(1))  # the output layers are zero
    with torch.no_grad():
        for v in adapter.values():
            v.normal_(std=0.1)
    still = {k: v for k, v in adapter.items() if "temporal" not in k}
    assert run(1).equal(run(1, still)) and run(3, still).equal(run(1, still))
    assert (run(3) - run(1)).abs().max() > 1e-3 and (
        run(6) - run(3)
    ).abs().max() > 1e-4  # any number of frames


def test_what_stands_still_in_the_source_stands_still_in_the_edit():
    torch.manual_seed(0)
    x, y, v, t = (
        torch.randn(6, 4, 2, 3),
        torch.randn(6, 4, 2, 3),
        torch.randn(6, 4, 2, 3),
        torch.full((6,), 0.7),
    )
    x[1, :, 0] = x[
        0, :, 0
    ]  # two clips of three frames; of the first two, the upper row stands still
    x[2, :, 1, 2] = x[1, :, 1, 2] + 0.2  # and one place of the last two is nearly alike
    velocity = lambda y, t: v
    want = y - 0.7 * v
    for clip in (range(3), range(3, 6)):
        for place in np.ndindex(2, 3):
            at = lambda a, i: a[(i, slice(None), *place)]
            for i in clip:
                weights = [
                    float(torch.exp(-(at(x, i) - at(x, j)).square().mean() / 0.05)) for j in clip
                ]
                mean = sum(
                    w * (at(y - 0.7 * v, j) - at(x, j)) for w, j in zip(weights, clip)
                ) / sum(weights)
                want[(i, slice(None), *place)] = at(x, i) + mean
    torch.testing.assert_close(y - 0.7 * steady(velocity, x, 3)(y, t), want, rtol=1e-4, atol=1e-4)
    assert steady(velocity, x, 1) is velocity  # a picture


def test_windows_of_a_long_clip_are_blended_and_never_longer_than_said():
    clip, seen = [(np.full((2, 2, 3), i, np.uint8), i / 30) for i in range(23)], []

    def change(pictures):
        seen.append(len(pictures))
        return [
            p.astype(np.float32) + 10 * len(seen) for p in pictures
        ]  # each window is 10 brighter than the one before

    out = list(windows(iter(clip), 8, change))
    assert [t for _, t in out] == [t for _, t in clip] and max(seen) == 8 and len(seen) == 4
    shift = [int(p[0, 0, 0]) - i for i, (p, _) in enumerate(out)]
    assert (
        shift[:6] == [10] * 6
        and shift[6:9] == [13, 17, 20]
        and shift[-1] == 40
        and sorted(shift) == shift
    )
    for n in (1, 5, 8, 9, 14):
        assert [
            int(p[0, 0, 0])
            for p, _ in windows(iter(clip[:n]), 8, lambda ps: [p.astype(np.float32) for p in ps])
        ] == list(range(n))


def film(path, frames=20, size=(66, 101), turned=False):
    """An H.264 film of thirty frames a second, with a tone; turned: the matrix of its header says a quarter clockwise."""
    rng = np.random.default_rng(0)
    scene = scenes.sample_scene(rng, style="plain", weather="clear", time="day")
    with av.open(str(path), "w") as file:
        video, sound = file.add_stream("libx264", rate=30), file.add_stream("aac", rate=44100)
        video.height, video.width, video.pix_fmt = *size, "yuv444p"
        for i in range(frames):
            picture = np.asarray(Image.fromarray(scenes.render(scene, i / 30)).resize(size[::-1]))
            file.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        tone = np.sin(np.arange(44100 * frames // 30)[None] * 0.06).astype(np.float32)
        for i in range(0, tone.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(tone[:, i : i + 1024]), "fltp", "mono"
            )
            frame.sample_rate, frame.pts = 44100, i
            file.mux(sound.encode(frame))
        file.mux(video.encode())
        file.mux(sound.encode())
    if turned:
        one, raw = 1 << 16, path.read_bytes()
        still, quarter = (
            struct.pack(">9i", *m)
            for m in (
                (one, 0, 0, 0, one, 0, 0, 0, 1 << 30),
                (0, one, 0, -one, 0, 0, size[0] * one, 0, 1 << 30),
            )
        )
        at = raw.index(still, raw.index(b"tkhd"))  # the first track is the video
        path.write_bytes(raw[:at] + quarter + raw[at + len(still) :])
    return path


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A short training on four clips of three kinds, one of them broken, and an unreadable fifth."""
    folder = tmp_path_factory.mktemp("clips")
    for i, name in enumerate(["a.webp", "b.gif", "c.mp4", "d"]):
        scene = scenes.sample_scene(np.random.default_rng(i), style="plain", season="summer")
        write_clip(folder / name, [(scenes.render(scene, k / 8), k / 8) for k in range(6)])
    (folder / "broken.mp4").write_bytes((folder / "c.mp4").read_bytes()[:300])
    out = folder.parent / f"{folder.name}-out"
    done = call(
        "train.py",
        "--data",
        folder,
        "--instr",
        "make it winter",
        "--base",
        "tiny",
        "--out",
        out,
        "--frames",
        4,
        "--steps",
        4,
        "--identity-first",
        2,
        "--identity-share",
        1,
        "--n",
        2,
        "--held",
        1,
    )
    assert done.returncode == 0, done.stderr
    assert "skipped" in done.stderr and "broken.mp4" in done.stderr
    assert len(list(read_frames(out / "samples" / "latest.webp"))) == 4
    return out, folder


def test_training_on_clips_resumes_exactly(out, tmp_path):
    """Besides: both states of a trajectory are of one window of the clip."""
    out, folder = out
    common = [
        "--data",
        folder,
        "--instr",
        "make it winter",
        "--base",
        "tiny",
        "--out",
        tmp_path / "b",
        "--frames",
        4,
        "--steps",
        4,
        "--identity-first",
        2,
        "--identity-share",
        1,
        "--n",
        2,
        "--held",
        1,
    ]
    code = (
        "import sys, signal, os, losses; n = [0]\nimport train; f = train.identity_loss\n"
        "def stop(*a):\n    n[0] += 1\n    if n[0] == 3: os.kill(os.getpid(), signal.SIGTERM)\n    return f(*a)\n"
        "def paired(model, adapter, average, x, *a):\n    assert x[:len(x) // 2].equal(x[len(x) // 2:])\n"
        "    return losses.byg_loss(model, adapter, average, x, *a)\n"
        "train.byg_loss = paired; train.identity_loss = stop; sys.argv = sys.argv[1:]; train.main()"
    )
    halted = call("-c", code, "train.py", *common)
    assert halted.returncode == 143, halted.stderr
    assert call("train.py", *common, "--resume").returncode == 0
    a, b = (
        load_file(out / "checkpoint.safetensors"),
        load_file(tmp_path / "b" / "checkpoint.safetensors"),
    )
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
    assert any("temporal" in k for k in a)


def test_a_film_goes_in_and_comes_out_alike(out, tmp_path):
    """Frame count, rate, displayed size and sound, of a film whose header turns it a quarter clockwise."""
    source, target = film(tmp_path / "in.mp4", turned=True), tmp_path / "out.mp4"
    plain = film(tmp_path / "plain.mp4")
    turned, straight = (next(iter(read_frames(p)))[0] for p in (source, plain))
    assert turned.shape == (101, 66, 3) and np.array_equal(turned, np.rot90(straight, -1))
    done = call("sample.py", "--run", out[0], "--input", source, "--output", target)
    assert done.returncode == 0, done.stderr
    with av.open(str(source)) as a, av.open(str(target)) as b:
        assert (b.streams.video[0].height, b.streams.video[0].width) == (101, 66)
        assert a.streams.video[0].average_rate == b.streams.video[0].average_rate == 30
        sounds = [[bytes(p) for p in f.demux(f.streams.audio[0])] for f in (a, b)]
        assert sounds[0] == sounds[1] and len(sounds[0]) > 20
    assert [t for _, t in read_frames(target)] == [t for _, t in read_frames(source)] and len(
        list(read_frames(target))
    ) == 20
    assert Image.open(tmp_path / "out.sheet.png").width > 100


def test_a_variable_rate_is_kept(tmp_path):
    """Times that are no multiples of any frame: 0, 10, 50, 51 and 200 hundredths."""
    source, times = tmp_path / "in.mkv", (0, 100, 500, 510, 2000)
    with av.open(str(source), "w") as file:
        video = file.add_stream("libx264", rate=25)
        video.height, video.width, video.pix_fmt, video.codec_context.time_base = (
            64,
            64,
            "yuv420p",
            Fraction(1, 1000),
        )
        for i, pts in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 40 * i, np.uint8), "rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            file.mux(video.encode(frame))
        file.mux(video.encode())
    write_clip(tmp_path / "out.mkv", read_frames(source), like=source)
    assert [round(1000 * t) for _, t in read_frames(tmp_path / "out.mkv")] == list(times)


def test_every_kind_of_clip_is_read_as_it_was_written(tmp_path):
    frames = [
        (scenes.render(scenes.sample_scene(np.random.default_rng(i))), i / 8) for i in range(3)
    ]
    for name, least in (
        ("a.png", 99),
        ("a.webp", 25),
        ("a.gif", 20),
        ("a.mp4", 25),
        ("a.webm", 25),
        ("a.mov", 25),
        ("folder", 99),
    ):
        write_clip(tmp_path / name, frames)
        read = list(read_frames(tmp_path / name))
        assert [t for _, t in read] == pytest.approx([0, 0.125, 0.25], abs=0.0051), (
            name
        )  # GIF counts in hundredths
        for (a, _), (b, _) in zip(frames, read):
            error = ((a.astype(float) - b) ** 2).mean()
            assert 10 * np.log10(255**2 / max(error, 1e-6)) > least, (name, error)


def test_what_is_wrong_with_clips_is_said(out, tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "still.png")
    write_clip(
        tmp_path / "moves.gif", [(np.full((9, 9, 3), 80 * i, np.uint8), i) for i in range(3)]
    )
    mixed = call(
        "train.py", "--data", tmp_path, "--instr", "make it winter", "--out", tmp_path / "no"
    )
    assert (
        mixed.returncode == 1
        and "mixes clips (moves.gif) and pictures (still.png)" in mixed.stderr
        and "Traceback" not in mixed.stderr
    )
    assert data.find(tmp_path, 1)[1] is False
    few = call(
        "train.py",
        "--data",
        "tiny/examples",
        "--frames",
        4,
        "--instr",
        "make it winter",
        "--out",
        tmp_path / "no",
    )
    assert few.returncode == 2 and "holds pictures, no clips" in few.stderr
    short = call(
        "train.py",
        "--data",
        out[1],
        "--frames",
        40,
        "--instr",
        "make it winter",
        "--base",
        "tiny",
        "--out",
        tmp_path / "no",
    )
    assert (
        short.returncode == 1
        and "fewer than --frames 40" in short.stderr
        and "none of the clips" in short.stderr
    )
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="pip install av; or use an animated WebP"):
        list(read_frames(out[1] / "c.mp4"))


def test_the_clip_editor_edits_pictures_what_it_held_back_and_folders_of_frames(out, tmp_path):
    config = json.loads((out[0] / "config.json").read_text())
    assert config["frames"] == 4
    assert (
        call(
            "sample.py",
            "--run",
            out[0],
            "--input",
            "tiny/examples/000.png",
            "--output",
            tmp_path / "a.png",
        ).returncode
        == 0
    )
    done = call("sample.py", "--run", out[0], "--output", tmp_path / "held.webp")
    assert done.returncode == 0 and len(list(read_frames(tmp_path / "held.webp"))) == 4, done.stderr
    shutil.copytree(out[1] / "d", tmp_path / "frames")
    (tmp_path / "frames" / ".DS_Store").touch()
    done = call(
        "sample.py",
        "--run",
        out[0],
        "--input",
        tmp_path / "frames",
        "--frames",
        3,
        "--output",
        tmp_path / "d",
    )
    assert done.returncode == 0 and sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        f"{i:05d}.png" for i in range(6)
    ], done.stderr
    (tmp_path / "clips").mkdir()
    write_clip(
        tmp_path / "clips" / "000.webp", read_frames(out[1] / "d")
    )  # a clip named by a number is no frame
    done = call(
        "sample.py", "--run", out[0], "--input", tmp_path / "clips", "--output", tmp_path / "e"
    )
    assert done.returncode == 0 and len(list(read_frames(tmp_path / "e" / "000.webp"))) == 6, (
        done.stderr
    )
