"""Nothing is lost and nothing hostile gets in: the short versions of bench/kills.py and bench/fuzz.py."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
from fuzz import fuzz  # noqa: E402


def test_damaged_files_are_accepted_or_refused_in_one_sentence():
    table, failures = fuzz(cases=200, seed=1)
    assert not failures, failures
    assert len(table) == 9 and all(
        c["refused"] for name, c in table.items() if name not in ("pictures", "clips")
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_random_moments_ends_as_one_never_killed():
    command = [
        sys.executable,
        ROOT / "bench" / "kills.py",
        "--kills",
        "8",
        "--steps",
        "12",
        "--seed",
        "3",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads(done.stdout.splitlines()[-1])["reached"]) == 8


RUN = [
    "--data",
    "tiny/examples",
    "--instr",
    "make it winter",
    "--base",
    "tiny",
    "--batch",
    "2",
    "--n",
    "2",
    "--views",
    "1",
    "--held",
    "1",
    "--rank",
    "4",
    "--identity-first",
    "20",
]


def test_steps_without_a_finite_gradient_never_reach_the_weights_and_training_ends_after_five(
    tmp_path,
):
    code = """if True:
        import sys, train
        count, good = [0], train.identity_loss
        def poisoned(*args):
            count[0] += 1
            return good(*args) * (float("nan") if count[0] > 3 else 1)
        train.identity_loss = poisoned
        try:
            train.main()
        except train.UserError as error:
            print(error, file=sys.stderr)
            sys.exit(error.code)"""
    done = subprocess.run(
        [sys.executable, "-c", code, *RUN, "--steps", "20", "--out", tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.count("skipped: the gradient is not finite") == 5
    assert "five steps in a row" in done.stderr and "--lr" in done.stderr
    saved = load_file(tmp_path / "out/checkpoint.safetensors")
    assert all(v.isfinite().all() for v in saved.values() if v.is_floating_point()) and any(
        "exp_avg" in k for k in saved
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_disk_that_takes_no_more_ends_training_with_a_sentence_and_leaves_the_last_save(tmp_path):
    import resource

    out = tmp_path / "out"
    command = [sys.executable, "train.py", *RUN, "--out", out]
    assert subprocess.run([*command, "--steps", "2"], cwd=ROOT, capture_output=True).returncode == 0
    before = {f: (out / f).read_bytes() for f in ("checkpoint.safetensors", "adapter.safetensors")}
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # noqa: E731
    done = subprocess.run(
        [*command, "--steps", "4", "--resume"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=full,
    )
    assert (
        done.returncode == 1
        and "cannot be written" in done.stderr
        and "Traceback" not in done.stderr
    ), done.stderr[-1000:]
    assert all((out / f).read_bytes() == old for f, old in before.items()) and not list(
        out.glob("*.tmp")
    )
