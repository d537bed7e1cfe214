"""One thread per rank (ranks share the cores), and Megatron's CPU meaning before anything imports Megatron."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from nemo_brain.host import cpu

torch.set_num_threads(1)
cpu.enable()
