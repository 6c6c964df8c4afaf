"""The script for a borrowed GPU runs, on the CPU and in small, and tells what fails."""

import json
import sys

import gpu
import pytest
from conftest import call


def test_all_that_needs_no_gpu_is_checked(tmp_path):
    done = call("bench/gpu.py", "--device", "cpu", "--out", tmp_path)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(line["ok"] and line["figures"] for line in lines), done.stdout + done.stderr
    assert [line["name"] for line in lines] == [check.__name__ for check in gpu.CHECKS]
    assert done.returncode == 0 and "on the CPU" in done.stderr


def right(lab):
    return {"nothing": float("nan")}


def wrong(lab):
    return gpu.require(["two is not one"], {"two": 2})


def broken(lab):
    return {"one": 1 / 0}


@pytest.mark.parametrize(
    "options, code, errors",
    [
        ("", 1, [None, "two is not one", "ZeroDivisionError: division by zero"]),
        ("--only right", 0, [None]),
        ("--only wrong right", 1, [None, "two is not one"]),
        ("--budget -1 --only right", 1, ["not begun: the budget is spent"]),
    ],
)
def test_what_fails_is_told_and_the_others_go_on(options, code, errors, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "CHECKS", (right, wrong, broken))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", *options.split()])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert end.value.code == code
    assert [line.get("error") for line in lines] == errors
    for line in lines:
        assert line["ok"] == ("error" not in line) and line["seconds"] < 5
        if line["name"] == "wrong":
            assert line["figures"] == {"two": 2}
