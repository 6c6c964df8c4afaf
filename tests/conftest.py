"""Where the project is, one thread for each worker, and its commands as a user runs them."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

# Before torch is imported: threads that wait do not spin. pytest.ini has a worker for each core,
# and the commands that the tests start get one thread, too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny"), str(ROOT / "bench")]
torch.set_num_threads(1)

WINTER = ("--instr", "make it winter")
SHORT = "--base tiny --size 32 --batch 2 --n 2 --rank 4".split()  # a run of seconds


def call(*args, **options):
    """Python with these arguments, in the project's folder. -> the finished process"""
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 280} | options
    return subprocess.run([sys.executable, *map(str, args)], **options)


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def copy_examples(folder, numbers):
    """Some of the example pictures with their captions."""
    lines = (ROOT / "tiny/examples/metadata.jsonl").read_text().splitlines()
    lines = [lines[i] for i in numbers]
    for line in lines:
        shutil.copy(ROOT / "tiny/examples" / json.loads(line)["file_name"], folder)
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """Sixteen pictures; two of them are held back from training."""
    return copy_examples(tmp_path_factory.mktemp("few"), range(16))


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Runs a command in this process, which saves the imports. -> exit code, what it said"""
    import runpy

    def refused(script, *args):
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        monkeypatch.chdir(ROOT)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return end.value.code, capsys.readouterr().err

    return refused
