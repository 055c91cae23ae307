"""`python benchmarks/gpu_first_token.py SHAPE`: load, answer one prompt, print the time of its first token.

In a process of its own, begun as the command line begins (see `gpu.start_up`).
"""

import sys

from liushui.runner import early

with early.collector_at_rest():
    early.bring_torch(gpu=True)
    import gpu

    bench = gpu.load(sys.argv[1])
gpu.first_token(bench)
