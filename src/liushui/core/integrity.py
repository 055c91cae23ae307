"""The scheduler's self-check: every number is counted a second time, from the plans in flight upwards."""

from collections import Counter
from typing import TYPE_CHECKING

from liushui.core.blocks import IntegrityError
from liushui.core.policy import order
from liushui.core.sequence import Sequence, Status

if TYPE_CHECKING:
    from liushui.core.scheduler import Scheduler


def check_scheduler(scheduler: "Scheduler") -> None:
    """Raises `IntegrityError` saying which count is wrong. Costs O(blocks + sequences)."""
    s = scheduler
    sequences = s._sequences.values()
    s.pool.check(seq.block_table for seq in sequences)
    _require(s._running == sorted(s._running, key=order), "the batch is out of order")
    _require(s._waiting == sorted(s._waiting, key=order), "the queue is out of order")
    queues = {Status.RUNNING: s._running, Status.WAITING: s.waiting, Status.HELD: [seq for seq, _ in s._held]}
    for leader in map(s._sequences.get, s._followers):
        _require(leader is not None and leader in (*s._waiting, *s._running), f"{leader} is followed, and not there")
    for status, queue in queues.items():
        there = sorted(seq.arrival for seq in queue)
        said = sorted(seq.arrival for seq in sequences if seq.status is status)
        _require(there == said, f"{status.value}: arrivals {there} are in the list, {said} have the status")
    slots = sorted([*s._free_slots, *(seq.slot for seq in sequences if seq.slot >= 0)])
    _require(slots == list(range(len(slots))), f"slots are lost or doubled: {slots}")

    named = Counter(item.seq_id for plan in s._plans for item in plan.items)
    sampled = Counter(item.seq_id for plan in s._plans for item in plan.items if item.samples)
    for seq in sequences:
        _check_sequence(seq, s.pool.block_size, named[seq.seq_id], sampled[seq.seq_id])
    for plan in s._plans:
        for item in plan.items:
            table = s._sequences[item.seq_id].block_table[: len(item.block_table)]
            _require(table == item.block_table, f"step {plan.step_id} in flight names blocks {item.seq_id} lost")


def _check_sequence(seq: Sequence, block_size: int, num_plans: int, num_sampled: int) -> None:
    _require(seq.num_in_flight == num_plans, f"{seq} counts {seq.num_in_flight} plans, named by {num_plans}")
    if seq.status is Status.RUNNING:
        _require(seq.slot >= 0, f"{seq} has no slot")
        capacity = len(seq.block_table) * block_size
        _require(seq.num_computed <= capacity, f"{seq} computes beyond its blocks")
        _require(seq.num_published * block_size <= seq.num_computed, f"{seq} published what is not computed")
    elif not num_plans:
        _require(not seq.block_table, f"{seq} keeps blocks")
        _require(seq.status is not Status.ENDED, f"{seq} is not forgotten")
    if seq.status in (Status.RUNNING, Status.WAITING):
        _require(seq.num_pending == num_sampled, f"{seq} awaits {seq.num_pending} tokens, {num_sampled} come")
        _require(seq.num_total <= seq.max_len, f"{seq} is longer than {seq.max_len}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IntegrityError(message)
