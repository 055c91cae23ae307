"""The pool of the native kernels: each case in a process of its own, since there is one pool per process."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.kernels.conftest import IMPLEMENTATIONS

pytestmark = pytest.mark.skipif(set(IMPLEMENTATIONS) == {"torch"}, reason="the native library is not built")
FORKS = """
import json, multiprocessing, os, resource, signal, sys, threading, time, traceback
import torch
torch.set_num_threads(1)
from liushui.kernels.ops import load_ops
for line in sys.stdin:
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        try:
            exec(json.loads(line), globals())
        except BaseException:
            os.write(sender, traceback.format_exc().encode())
        os._exit(0)
    os.close(sender)
    with open(receiver) as report:
        said = report.read()
    print(json.dumps([os.waitpid(child, 0)[1], said]), flush=True)
"""
"""torch is imported once; a case is a child that has made no pool yet."""
START = """
x = torch.randn(64, 2000)
one, three = load_ops("native", 1), load_ops("native", 3)
expected = one.gelu_new(x)
def works(ops=three, times=1):
    return all(torch.equal(ops.gelu_new(x), expected) for _ in range(times))
"""


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[str], None]]:
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def case(script: str) -> None:
            print(json.dumps(START + script), file=process.stdin, flush=True)
            assert json.loads(process.stdout.readline()) == [0, ""]

        yield case
        process.stdin.close()


def test_a_forked_child_has_a_pool_of_its_own(run: Callable[[str], None]) -> None:
    run("""
assert works()
child = os.fork()
if not child:
    os._exit(0 if works(times=20) else 1)
assert os.waitpid(child, 0)[1] == 0
assert works(times=20)
def task(q):
    q.put(works(times=20))
context = multiprocessing.get_context("fork")
q = context.Queue()
process = context.Process(target=task, args=(q,))
process.start()
assert q.get(timeout=60)
process.join()
assert process.exitcode == 0
""")


def test_more_threads_than_processors_and_several_callers(run: Callable[[str], None]) -> None:
    run("""
many = load_ops("native", 4 * (os.cpu_count() or 1))
assert works(many, 20)
results = []
callers = [threading.Thread(target=lambda ops=ops: results.append(works(ops, 50))) for ops in (many, three, three, one)]
for caller in callers: caller.start()
for caller in callers: caller.join()
assert results == [True] * 4, results
""")


def test_quiet_when_idle(run: Callable[[str], None]) -> None:
    """Processor time while nothing is asked for, as a share of wall time."""
    run("""
assert works(times=10)
time.sleep(0.05)
def spent():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
before, start = spent(), time.perf_counter()
time.sleep(0.5)
share = (spent() - before) / (time.perf_counter() - start)
assert share < 0.1, share
""")


@pytest.mark.skipif(not hasattr(__import__("os"), "sched_setaffinity"), reason="no affinity here")
def test_the_affinity_mask_is_kept(run: Callable[[str], None]) -> None:
    run("""
allowed = os.sched_getaffinity(0)
cores = load_ops("native", len(allowed))
assert works(cores, 20)
assert os.sched_getaffinity(0) == allowed  # the caller may go where it could before
masks = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
assert all(mask <= allowed for mask in masks)
only = {min(allowed)}
os.sched_setaffinity(0, only)
child = os.fork()
if not child:  # more threads than processors: none has a place of its own, all stay within the mask
    right = works(three, 20)
    masks = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
    os._exit(0 if right and all(mask == only for mask in masks) else 1)
assert os.waitpid(child, 0)[1] == 0
""")


def test_signals_are_left_to_the_program(run: Callable[[str], None]) -> None:
    run("""
assert works()
seen = []
signal.signal(signal.SIGUSR1, lambda *_: seen.append(threading.current_thread() is threading.main_thread()))
os.kill(os.getpid(), signal.SIGUSR1)
assert works(times=5)
assert seen == [True]
if sys.platform == "linux":
    status = [open(f"/proc/self/task/{task}/status").read() for task in os.listdir("/proc/self/task")]
    assert sum("SigBlk:\\t0000000000000000" not in text for text in status) >= 2
""")


def test_torch_s_threads_on_demand(run: Callable[[str], None]) -> None:
    """For models part of whose products are torch's."""
    run("""
three.share_threads(with_torch=True)
assert works(times=20)
three.share_threads(with_torch=False)
assert works(times=20)
""")
