import os
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]
torch.set_num_threads(1)  # pytest.ini: two workers
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that they start, too
