"""Everything offline, the same threads and random numbers everywhere; a test that needs others sets them."""

import os

import pytest

from tests import checked  # before anything of itda, which its name is written into

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin slow down whatever else runs; before torch
os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported; see pursuit/test_gpu.py
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("COLUMNS", None)  # which runners of tests set: piped output is as wide as it is without


@pytest.fixture(autouse=True)
def seeded():
    """So that no test depends on which others ran before it."""
    import random

    import numpy as np
    import torch

    checked.begin()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
