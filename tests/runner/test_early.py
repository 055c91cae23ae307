"""The garbage collector around a load: off within, and what is there afterwards left out; Triton's key beside it."""

import gc
import weakref

import pytest
import torch

from liushui.runner import early
from tests.support import tiny


def test_nothing_is_collected_within_and_what_is_there_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    monkeypatch.setattr(gc, "get_freeze_count", lambda: len(frozen))
    for _ in range(2):
        with early.collector_at_rest():
            assert not gc.isenabled()
            with early.collector_at_rest():
                assert not gc.isenabled()
            assert not gc.isenabled()
        assert gc.isenabled()
    assert frozen == [False], "once a process"


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with early.collector_at_rest():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_collector_comes_back_after_a_failure() -> None:
    with pytest.raises(ZeroDivisionError), early.collector_at_rest():
        raise ZeroDivisionError
    assert gc.isenabled()


@pytest.mark.parametrize("settings", [{"device": "cpu"}, {"device": "cpu", "kernels": "triton"}])
def test_a_runner_needs_no_collector_to_be_freed(settings: dict[str, str]) -> None:
    """A load sets aside what is there, the model too: it must not be part of a cycle."""
    if "kernels" in settings:
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            settings = {"device": "cuda"}
    runner = tiny.runner(tiny.oracle("qwen3", 3), block_size=16, max_num_seqs=4, **settings)
    kept = weakref.ref(runner.model.layers[0].attention), weakref.ref(runner.kv.keys)
    gc.disable()
    try:
        del runner
        assert [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("found", [True, False])
def test_what_reaches_the_device_is_made_where_there_is_one(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from liushui.kernels.triton import launchers

    made: list[bool] = []
    monkeypatch.setattr(launchers, "make_driver", lambda: made.append(True))
    monkeypatch.setattr(early, "_wake_driver", lambda: found)
    early._ready_tools()
    assert made == [True] * found


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_machine_without_a_driver_makes_nothing_and_says_nothing() -> None:
    pytest.importorskip("triton")
    from liushui.kernels.triton import launchers

    assert not early._wake_driver()
    launchers.make_driver()


def test_tritons_key_is_found_once() -> None:
    pytest.importorskip("triton")
    thread = early.compilers_tools()
    assert early.compilers_tools() is thread
    thread.join()
    from triton.runtime.cache import triton_key

    assert len(triton_key()) > 8
