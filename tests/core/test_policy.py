"""Who is served next: properties of the order, of the tenants' shares, of deadlines."""

from hypothesis import given, settings
from hypothesis import strategies as st

from liushui.core.policy import Shares, first_in_line, rank
from liushui.core.request import FinishReason
from tests.core.world import World, make

times = st.floats(0, 1000, allow_nan=False)
priorities = st.integers(-5, 5)


def ranked(name: str, priority: int, arrival_time: float, arrival: int, ageing: float | None) -> tuple[float, int]:
    return rank(make(name, 1, priority=priority, arrival_time=arrival_time).request, arrival, ageing)


@given(priorities, times, times, st.one_of(st.none(), st.floats(0.01, 100)))
def test_equal_priorities_keep_the_order_of_arrival(
    priority: int, first: float, second: float, ageing: float | None
) -> None:
    first, second = sorted((first, second))
    assert ranked("a", priority, first, 0, ageing) < ranked("b", priority, second, 1, ageing)


@given(priorities, priorities, times, times)
def test_without_ageing_priorities_are_absolute(p: int, q: int, first: float, second: float) -> None:
    assert (ranked("a", p, first, 0, None) < ranked("b", q, second, 1, None)) == (p <= q)


@given(priorities, priorities, times, st.floats(0.1, 50), st.floats(0, 2))
def test_ageing_bounds_how_long_one_can_be_overtaken(p: int, q: int, first: float, ageing: float, late: float) -> None:
    """Whoever comes more than (p - q) * ageing seconds after it stays behind it, whatever its priority."""
    second = first + max(p - q, 0) * ageing + late + 1e-6
    assert ranked("a", p, first, 0, ageing) < ranked("b", q, second, 1, ageing)


def test_higher_priority_overtakes_only_the_young() -> None:
    world = World(max_num_seqs=1, ageing=10.0)
    world.add(make("running", 1, max_tokens=8))
    world.schedule()
    world.add(make("old", 1, priority=1, arrival_time=0.0), make("young", 1, priority=1, arrival_time=8.0))
    world.add(make("urgent", 1, priority=0, arrival_time=12.0))
    assert [seq.seq_id for seq in world.scheduler.waiting] == ["old", "urgent", "young"]
    world.run()


# -- tenants


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=40),
    st.integers(1, 3),
)
def test_everybody_is_served_whoever_shares(requests: list[tuple[str, int, int]], seats: int) -> None:
    """Any tenants, any sizes: all end, each tenant's own in the order of their arrival."""
    world = World(max_num_seqs=seats)
    world.add(*(make(str(i), prompt, tokens, tenant=tenant) for i, (tenant, prompt, tokens) in enumerate(requests)))
    world.run()
    entered = [seq_id for plan in world.plans for seq_id, _ in plan.admitted]
    for tenant in "abc":
        own = [i for i in entered if requests[int(i)][0] == tenant]
        assert own == sorted(own, key=int)


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 30), st.integers(1, 3), st.integers(1, 8), st.integers(1, 8))
def test_a_flood_of_one_tenant_does_not_drown_another(flood: int, seats: int, big: int, small: int) -> None:
    """`b` comes after all of `a` and is next as soon as a place is free; while both wait, neither gets more than the
    other by more than what fits into the places at once."""
    world = World(max_num_seqs=seats, num_blocks=256)
    world.add(*(make(f"a{i}", big, 4, tenant="a") for i in range(flood)))
    world.step()
    world.add(*(make(f"b{i}", small, 4, tenant="b") for i in range(4)))
    entered: list[str] = []
    while any(seq.request.tenant == "b" for seq in world.scheduler.waiting):
        plan = world.step()
        entered += [seq_id for seq_id, _ in plan.admitted]
        served = world.scheduler._shares.served
        if {seq.request.tenant for seq in world.scheduler.waiting} == {"a", "b"}:
            assert abs(served["a"] - served["b"]) <= (seats + 1) * (max(big, small) + 4)
    if len(entered) > 1 and flood > seats:
        assert "b0" in entered[: 1 + seats]
    world.run()


def test_absence_earns_no_credit() -> None:
    shares = Shares()
    shares.enter("a")
    shares.enter("b")
    shares.charge("a", 1000)
    shares.leave("b")
    shares.enter("b")
    assert shares.served == {"a": 1000, "b": 1000}
    shares.charge("b", 500)
    shares.leave("b")
    shares.enter("b")
    assert shares.served["b"] == 1500  # nor does coming back wipe out what one had
    shares.leave("a")
    shares.leave("b")
    shares.enter("a")
    assert shares.served == {"a": 0}


def test_the_tenant_served_least_is_next_and_of_equals_the_first() -> None:
    world = World()
    one, two, three = make("1", 1, tenant="a"), make("2", 1, tenant="b"), make("3", 1, tenant="b")
    world.add(one, two, three)
    waiting = world.scheduler.waiting
    assert first_in_line(waiting, {"a": 5, "b": 5}) is one
    assert first_in_line(waiting, {"a": 6, "b": 5}) is two
    assert first_in_line(waiting[:1], {"a": 6}) is one
    world.run()


# -- deadlines


def test_deadlines_in_the_queue_and_in_the_batch() -> None:
    world = World(max_num_seqs=1)
    world.add(make("runs", 2, max_tokens=50, deadline=3.0), make("waits", 2, deadline=2.0), make("free", 2))
    world.run()
    assert world.late == {"runs", "waits"}
    assert world.aborted == world.late
    assert world.finished["free"].reason is FinishReason.LENGTH
    assert len(world.answers["runs"]) == 3
    assert world.answers["waits"] == []


def test_who_ends_in_time_is_not_named() -> None:
    world = World()
    world.add(make("quick", 2, max_tokens=2, deadline=5.0))
    world.run()
    assert world.scheduler.overdue(10.0) == []


def test_a_deadline_is_not_taken_for_that_of_a_later_sequence_of_the_same_name() -> None:
    world = World()
    world.add(make("name", 2, max_tokens=2, deadline=5.0))
    world.run()
    world.scheduler.add(make("name", 2, max_tokens=2))
    assert world.scheduler.overdue(20.0) == []
