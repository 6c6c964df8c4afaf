"""The mean of several editors, weight for weight (model soups, arXiv 2203.05482), for editors that were trained on from one another.

python tiny/mean.py out_a out_b --out out_mean           # for sample.py and evaluate.py, with the first run's options and held-back pictures
"""

import argparse
import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from files.disk import UserError, read_tensors, write_tensors  # noqa: E402


def main():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("runs", nargs="+", help="folders of runs of the same base and rank")
    p.add_argument("--out", required=True, help="folder to make")
    p.add_argument(
        "--half", action="store_true", help="write float16: half the file, to be published"
    )
    o = p.parse_args()
    (first, meta), *others = (
        read_tensors(pathlib.Path(run) / "adapter.safetensors") for run in o.runs
    )
    for run, (tensors, _) in zip(o.runs[1:], others):
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in first.items()}:
            raise UserError(
                f"{run}: its adapter has other tensors than that of {o.runs[0]} (another base, rank, or one of them for clips)"
            )
    if pathlib.Path(o.out).exists():
        raise UserError(f"{o.out} exists already; choose another --out", 2)
    shutil.copytree(
        pathlib.Path(o.runs[0]) / "held", pathlib.Path(o.out) / "held"
    )  # its card and samples are of another editor
    shutil.copy(pathlib.Path(o.runs[0]) / "config.json", o.out)
    mean = {
        k: sum((tensors[k] for tensors, _ in others), v) / len(o.runs) for k, v in first.items()
    }
    write_tensors(
        pathlib.Path(o.out) / "adapter.safetensors",
        {k: v.half() if o.half else v for k, v in mean.items()},
        **meta,
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"mean.py: {error}", file=sys.stderr)
        sys.exit(error.code)
