"""Settings that all tests share; they must precede the first import of torch and Triton."""

import os
from pathlib import Path

# Torch's worker threads spin between operations; on a busy test machine that starves the neighbours.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Without a GPU, Triton's kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

settings.register_profile("liushui", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("liushui")
