"""The mean of several editors, weight for weight (model soups, arXiv 2203.05482), for editors that
were trained on from one another.

    python tiny/mean.py out_a out_b --out out_mean

The new run has the first one's options and held-back pictures, for sample.py and evaluate.py.
"""

import argparse
import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from files.disk import UserError, read_tensors, write_tensors  # noqa: E402


def mean_of(adapters, names):
    """adapters: dicts of equally shaped tensors, of the runs `names`. -> dict of their means"""
    shapes = [{key: v.shape for key, v in tensors.items()} for tensors in adapters]
    for name, these in zip(names, shapes):
        if these != shapes[0]:
            raise UserError(
                f"{name}: its adapter has other tensors than that of {names[0]} (another base or "
                "rank, or one of them for clips)"
            )
    return {key: sum(a[key].float() for a in adapters) / len(adapters) for key in adapters[0]}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("runs", nargs="+", help="folders of runs of the same base and rank")
    p.add_argument("--out", required=True, type=pathlib.Path, help="folder to make")
    p.add_argument("--half", action="store_true", help="write float16: half the file, to publish")
    o = p.parse_args()
    files = [read_tensors(pathlib.Path(run) / "adapter.safetensors") for run in o.runs]
    mean = mean_of([tensors for tensors, _ in files], o.runs)
    if o.half:
        mean = {key: v.half() for key, v in mean.items()}
    if o.out.exists():
        raise UserError(f"{o.out} exists already; choose another --out", 2)
    first = pathlib.Path(o.runs[0])
    shutil.copytree(first / "held", o.out / "held")  # card and samples are of another editor
    shutil.copy(first / "config.json", o.out)
    _, meta = files[0]
    write_tensors(o.out / "adapter.safetensors", mean, **meta)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"mean.py: {error}", file=sys.stderr)
        sys.exit(error.code)
