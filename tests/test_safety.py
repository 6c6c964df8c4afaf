"""Nothing is lost and nothing hostile gets in: the short versions of bench/kills.py and
bench/fuzz.py, and what training does when a gradient or the disk fails."""

import json
import os
import sys

import pytest
import torch
from conftest import ROOT, SHORT, WINTER, call
from fuzz import fuzz
from safetensors.torch import load_file

from files.disk import UserError, read_json, write, write_tensors
from files.run import key_in_file, load_adapter, read_run
from frozen.load import load_base
from model import new_adapter

# train.py, whose loss is not finite from the fourth step on
POISONED = """if True:
    import sys, train
    count, good = [0], train.byg_loss
    def poisoned(*args):
        count[0] += 1
        loss, figures = good(*args)
        return loss * (float("nan") if count[0] > 3 else 1), figures
    train.byg_loss = poisoned
    try:
        train.main()
    except train.UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)
"""


def test_damaged_files_are_accepted_or_refused_in_one_sentence():
    table, failures = fuzz(cases=200, seed=1)
    assert not failures, failures
    assert len(table) == 9
    for name, count in table.items():
        assert count["refused"] or name in ("pictures", "clips"), name  # left out with a warning


def test_an_adapter_of_numbers_is_refused(tmp_path):
    model, file = load_base("tiny")[0], tmp_path / "adapter.safetensors"
    numbers = {key_in_file(name): torch.tensor(1.0) for name in new_adapter(model, 2)}
    write_tensors(file, numbers)
    with pytest.raises(UserError, match="does not fit this base"):
        load_adapter(file, model)


def test_a_config_that_names_no_instruction_is_that_of_many(tmp_path):
    config = read_json(ROOT / "tiny/editor/config.json")
    write(tmp_path / "config.json", {k: v for k, v in config.items() if k != "instr"})
    assert read_run(tmp_path)["instr"] is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_random_moments_ends_as_one_never_killed():
    done = call("bench/kills.py", "--kills", 8, "--steps", 12, "--seed", 3, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads(done.stdout.splitlines()[-1])["reached"]) == 8


def test_gradients_that_are_not_finite_never_reach_the_weights_and_five_of_them_end_training(
    few, tmp_path
):
    out = tmp_path / "out"
    done = call("-c", POISONED, "--data", few, *WINTER, *SHORT, "--steps", 20, "--out", out)
    assert done.returncode == 1
    assert done.stderr.count("skipped: the gradient is not finite") == 5
    assert "five steps in a row" in done.stderr and "--lr" in done.stderr
    saved = load_file(out / "checkpoint.safetensors")
    assert any("exp_avg" in key for key in saved)
    assert all(v.isfinite().all() for v in saved.values() if v.is_floating_point())


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_disk_that_takes_no_more_ends_training_with_a_sentence_and_leaves_the_last_save(
    few, tmp_path
):
    import resource

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    out = tmp_path / "out"
    command = ["train.py", "--data", few, *WINTER, *SHORT, "--out", out]
    assert call(*command, "--steps", 2).returncode == 0
    saved = [out / "checkpoint.safetensors", out / "adapter.safetensors"]
    before = [file.read_bytes() for file in saved]
    done = call(*command, "--steps", 4, "--resume", preexec_fn=full)
    assert done.returncode == 1 and "cannot be written" in done.stderr, done.stderr[-1000:]
    assert "Traceback" not in done.stderr
    assert [file.read_bytes() for file in saved] == before
    assert not list(out.glob("*.tmp"))
