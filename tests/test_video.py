"""Clips: attention over frames, what is read and written, training and editing on them."""

import json
import shutil
import struct
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from conftest import SHORT, WINTER, call
from PIL import Image
from safetensors.torch import load_file

import scenes
from data import read_prompts
from files.clips import read_frames, windows, write_clip
from files.disk import UserError
from files.folder import find
from model import MMDiT, new_adapter, temporal

# train.py with two steps of identity, then both losses; told to end in step int(argv[1])
TRAIN = """if True:
    import os, signal, sys, train
    from dataclasses import replace
    train.CLIPS["default"] = {"identity_first": 2}
    train.RECIPES["default"] = replace(train.RECIPES["default"], identity_share=1.0)
    last, set_rate = int(sys.argv.pop(1)), train.set_rate
    def interrupted(opt, step, recipe):
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return set_rate(opt, step, recipe)
    train.set_rate = interrupted
    train.main()
"""


# ---- the attention -----------------------------------------------------------------------------
def test_temporal_attention_is_what_its_formula_says():
    """For every place of every clip on its own: h + sum_j a_ij (v_j - v_i), of one head."""
    d, w, frames = 64, 32, 5
    x, qkv, out = torch.randn(2 * frames, 3, d), torch.randn(3 * w, d), torch.randn(d, w)
    y = temporal(x, frames, {"temporal.qkv.weight": qkv, "temporal.out.weight": out})
    q_w, k_w, v_w = qkv.chunk(3)
    angles = np.arange(frames)[:, None] * 1000 ** (-np.arange(d // 2) / (d // 2))
    place = torch.tensor(np.concatenate([np.sin(angles), np.cos(angles)], 1), dtype=torch.float)
    for clip in (slice(0, 5), slice(5, 10)):
        for n in range(3):
            h = x[clip, n]  # (F, d)
            u = h - h.mean(-1, keepdim=True)
            u = u / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            a = ((u + place) @ q_w.T @ k_w @ (u + place).T / w**0.5).softmax(-1)
            want = h + (a @ u - u) @ v_w.T @ out.T
            torch.testing.assert_close(y[clip, n], want, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_one_frame_and_a_fresh_adapter_are_the_image_path_bit_for_bit():
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32}
    widths = {"joint_attention_dim": 24, "pooled_projection_dim": 12, "pos_embed_max_size": 8}
    model = MMDiT(sizes | widths | {"in_channels": 4, "out_channels": 4, "qk_norm": "rms_norm"})
    x, source = torch.randn(2, 6, 4, 8, 8)
    prompt = torch.randn(6, 5, 20), torch.randn(6, 12)
    adapter = new_adapter(model, 4, video=True)

    def edited(frames, adapter=adapter):
        return model(x, torch.full((6,), 0.5), prompt, source, adapter, frames)

    assert edited(3).equal(edited(1))  # the output layers are zero
    for v in adapter.values():
        v.normal_(std=0.1)
    still = {name: v for name, v in adapter.items() if "temporal" not in name}
    assert edited(1).equal(edited(1, still)) and edited(3, still).equal(edited(1, still))
    assert (edited(3) - edited(1)).abs().max() > 1e-3
    assert (edited(6) - edited(3)).abs().max() > 1e-4  # any number of frames


# ---- reading and writing -----------------------------------------------------------------------
def test_windows_of_a_long_clip_are_blended_and_never_longer_than_said():
    """Of 23 frames, where each window is made 10 brighter than the one before."""
    clip, seen = [(np.full((2, 2, 3), i, np.uint8), i / 30) for i in range(23)], []

    def brighter(pictures):
        seen.append(len(pictures))
        return [picture.astype(np.float32) + 10 * len(seen) for picture in pictures]

    out = list(windows(iter(clip), 8, brighter))
    assert [t for _, t in out] == [t for _, t in clip]
    assert max(seen) == 8 and len(seen) == 4
    added = [int(picture[0, 0, 0]) - i for i, (picture, _) in enumerate(out)]
    assert added[:9] == [10] * 6 + [13, 17, 20] and added[-1] == 40
    assert added == sorted(added)


@pytest.mark.parametrize("n", [1, 5, 8, 9, 14])
def test_windows_that_change_nothing_give_every_frame_once(n):
    clip = [(np.full((2, 2, 3), i, np.uint8), i / 30) for i in range(n)]
    out = windows(iter(clip), 8, lambda pictures: [p.astype(np.float32) for p in pictures])
    assert [int(picture[0, 0, 0]) for picture, _ in out] == list(range(n))


def turn_header(path, width):
    """A quarter clockwise, in the matrix of the first track, which is the video."""
    one, raw = 1 << 16, path.read_bytes()
    upright = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    quarter = struct.pack(">9i", 0, one, 0, -one, 0, 0, width * one, 0, 1 << 30)
    at = raw.index(upright, raw.index(b"tkhd"))
    path.write_bytes(raw[:at] + quarter + raw[at + len(upright) :])


def film(path, frames=20, size=(66, 101)):
    """An H.264 film of thirty frames a second, with a tone."""
    scene = scenes.sample_scene(np.random.default_rng(0), style="plain", weather="clear")
    tone = np.sin(np.arange(44100 * frames // 30)[None] * 0.06).astype(np.float32)
    with av.open(str(path), "w") as file:
        video, sound = file.add_stream("libx264", rate=30), file.add_stream("aac", rate=44100)
        video.height, video.width, video.pix_fmt = *size, "yuv444p"
        for i in range(frames):
            picture = Image.fromarray(scenes.render(scene, i / 30)).resize(size[::-1])
            file.mux(video.encode(av.VideoFrame.from_ndarray(np.asarray(picture), "rgb24")))
        for i in range(0, tone.shape[1], 1024):
            piece = np.ascontiguousarray(tone[:, i : i + 1024])
            frame = av.AudioFrame.from_ndarray(piece, "fltp", "mono")
            frame.sample_rate, frame.pts = 44100, i
            file.mux(sound.encode(frame))
        file.mux(video.encode())
        file.mux(sound.encode())
    return path


def test_a_variable_rate_is_kept(tmp_path):
    """Times that are no multiples of any frame: 0, 10, 50, 51 and 200 hundredths."""
    source, target, times = tmp_path / "in.mkv", tmp_path / "out.mkv", (0, 100, 500, 510, 2000)
    unit = Fraction(1, 1000)
    with av.open(str(source), "w") as file:
        video = file.add_stream("libx264", rate=25)
        video.height, video.width, video.pix_fmt = 64, 64, "yuv420p"
        video.codec_context.time_base = unit
        for i, pts in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 40 * i, np.uint8), "rgb24")
            frame.pts, frame.time_base = pts, unit
            file.mux(video.encode(frame))
        file.mux(video.encode())
    write_clip(target, read_frames(source), like=source)
    assert [round(1000 * t) for _, t in read_frames(target)] == list(times)


@pytest.mark.parametrize(
    "name, least",  # dB
    [
        *[("a.png", 99), ("folder", 99), ("a.webp", 25), ("a.gif", 20)],
        *[("a.mp4", 25), ("a.webm", 25), ("a.mov", 25)],
    ],
)
def test_every_kind_of_clip_is_read_as_it_was_written(name, least, tmp_path):
    drawn = [scenes.render(scenes.sample_scene(np.random.default_rng(i))) for i in range(3)]
    write_clip(tmp_path / name, [(picture, i / 8) for i, picture in enumerate(drawn)])
    pictures, times = zip(*read_frames(tmp_path / name))
    assert times == pytest.approx([0, 0.125, 0.25], abs=0.0051)  # GIF counts in hundredths
    for a, b in zip(drawn, pictures, strict=True):
        error = ((a.astype(float) - b) ** 2).mean()
        assert 10 * np.log10(255**2 / max(error, 1e-6)) > least, error


# ---- training and editing ----------------------------------------------------------------------
@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four clips of six frames, of four kinds, and one that is cut short."""
    folder = tmp_path_factory.mktemp("clips")
    for i, name in enumerate(["a.webp", "b.gif", "c.mp4", "d"]):
        scene = scenes.sample_scene(np.random.default_rng(i), style="plain", season="summer")
        write_clip(folder / name, [(scenes.render(scene, k / 8), k / 8) for k in range(6)])
    (folder / "broken.mp4").write_bytes((folder / "c.mp4").read_bytes()[:300])
    return folder


def train_on(clips, out, *more, stop=0):
    command = ["--data", clips, *WINTER, *SHORT, "--frames", 4, "--steps", 4, "--out", out]
    return call("-c", TRAIN, stop, *command, *more)


@pytest.fixture(scope="module")
def trained(clips):
    out = clips.with_name("clips-out")
    done = train_on(clips, out)
    assert done.returncode == 0, done.stderr
    assert "skipped" in done.stderr and "broken.mp4" in done.stderr
    return out


def test_training_on_clips_resumes_exactly(trained, clips, tmp_path):
    assert len(list(read_frames(trained / "samples" / "latest.webp"))) == 4
    halted = train_on(clips, tmp_path / "b", stop=3)
    assert halted.returncode == 143, halted.stderr
    assert train_on(clips, tmp_path / "b", "--resume").returncode == 0
    a, b = (load_file(out / "checkpoint.safetensors") for out in (trained, tmp_path / "b"))
    assert a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)
    assert any("temporal" in key for key in a)


def test_a_film_goes_in_and_comes_out_alike(trained, tmp_path):
    """Frame count, rate, displayed size and sound, of a film whose header turns it a quarter
    clockwise."""
    source, target = film(tmp_path / "in.mp4"), tmp_path / "out.mp4"
    straight, _ = next(read_frames(source))
    turn_header(source, width=66)
    turned, _ = next(read_frames(source))
    assert turned.shape == (101, 66, 3) and np.array_equal(turned, np.rot90(straight, -1))
    done = call("sample.py", "--run", trained, "--input", source, "--steps", 2, "--output", target)
    assert done.returncode == 0, done.stderr
    with av.open(str(source)) as a, av.open(str(target)) as b:
        assert (b.streams.video[0].height, b.streams.video[0].width) == (101, 66)
        assert a.streams.video[0].average_rate == b.streams.video[0].average_rate == 30
        sounds = [[bytes(packet) for packet in f.demux(f.streams.audio[0])] for f in (a, b)]
        assert sounds[0] == sounds[1] and len(sounds[0]) > 20
    times = [[t for _, t in read_frames(path)] for path in (source, target)]
    assert times[0] == times[1] and len(times[0]) == 20
    assert Image.open(tmp_path / "out.sheet.png").width > 100


def test_the_clip_editor_edits_pictures_and_what_it_held_back(trained, tmp_path):
    command = ["sample.py", "--run", trained, "--steps", 2, "--output"]
    done = call(*command, tmp_path / "a.png", "--input", "tiny/examples/000.png")
    assert done.returncode == 0 and (tmp_path / "a.png").exists(), done.stderr
    done = call(*command, tmp_path / "held.webp")
    assert done.returncode == 0, done.stderr
    assert len(list(read_frames(tmp_path / "held.webp"))) == 4
    assert json.loads((trained / "config.json").read_text())["frames"] == 4


def test_the_clip_editor_edits_folders_of_frames_and_of_clips(trained, clips, tmp_path):
    """Numbered pictures are one clip, whatever else the system puts beside them; a clip that is
    named by a number is no frame."""
    command = ["sample.py", "--run", trained, "--steps", 2, "--input"]
    shutil.copytree(clips / "d", tmp_path / "frames")
    (tmp_path / "frames" / ".DS_Store").touch()
    done = call(*command, tmp_path / "frames", "--frames", 3, "--output", tmp_path / "d")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "d").iterdir())
    assert names == [f"{i:05d}.png" for i in range(6)]
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "000.webp", read_frames(clips / "d"))
    done = call(*command, tmp_path / "clips", "--output", tmp_path / "e")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "e").iterdir()} == {"000.webp", "000.sheet.png"}


def test_of_pictures_and_clips_together_the_others_are_left_out_and_counted(tmp_path, capsys):
    """The pictures are taken or, where --frames asks for clips, the clips; a caption of what is
    left out is no fault."""
    Image.new("RGB", (9, 9)).save(tmp_path / "still.png")
    moves = [(np.full((9, 9, 3), 80 * i, np.uint8), i) for i in range(3)]
    write_clip(tmp_path / "moves.gif", moves)
    (tmp_path / "film.mp4").write_bytes(b"")
    line = {"file_name": "moves.gif", "text": "a house in summer"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    for frames, taken, clips, words in (
        (None, ["still.png"], False, "clips left out: 2 (film.mp4); the pictures"),
        (1, ["moves.gif", "still.png"], False, "clips left out: 1 (film.mp4); the pictures"),
        (2, ["film.mp4", "moves.gif"], True, "pictures left out: 1 (still.png); the clips"),
    ):
        paths, found = find(tmp_path, frames)
        assert ([p.name for p in paths], found) == (taken, clips)
        assert words in capsys.readouterr().err
    rows = read_prompts(tmp_path, find(tmp_path)[0], "make it winter")
    assert [row["path"].name for row in rows] == ["still.png"]


def test_what_is_wrong_with_clips_is_said(clips, tmp_path, monkeypatch, refusal):
    command = ["train.py", "--base", "tiny", *WINTER, "--out", tmp_path / "no"]
    for data, frames, ends, words in (
        ("tiny/examples", ("--frames", 4), 2, "holds pictures, no clips"),
        (clips, ("--frames", 40), 1, "none of the clips could be read"),
    ):
        code, said = refusal(*command, "--data", data, *frames)
        assert code == ends and words in said, said
    assert "has 6 frames, fewer than --frames 40" in said
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="pip install av; or use an animated WebP"):
        list(read_frames(clips / "c.mp4"))
