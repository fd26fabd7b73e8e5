"""One thread, Triton interpreted, and hypothesis without deadlines.

The first `jvp` imports dynamo, which takes longer than a deadline.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# The kernels run on the CPU, as far as Triton's interpreter goes; read at its import.
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")
