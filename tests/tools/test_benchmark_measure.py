import pytest
import torch

from tools.benchmark_measure import FEWEST_ROUNDS, Budget, Spread, interleave, ratios, spread
from tools.benchmark_roofline import (
    Bound,
    Ceilings,
    Work,
    assignment_work,
    bound,
    convolution_work,
    deformable_work,
    gaussian_work,
    linear_work,
)

# --- counts -------------------------------------------------------------------------------------


def test_deformable_counts():
    # B 2, S 10, H 3, D 4, N 5, V 2, P 6
    value = torch.zeros(2, 10, 3, 4, dtype=torch.bfloat16)
    locations, weights = torch.zeros(2, 5, 3, 2, 6, 2), torch.zeros(2, 5, 3, 2, 6)
    # value 240 * 2, locations 720 * 4, weights 360 * 4, output 120 * 2
    forward = deformable_work(value, locations, weights)
    assert forward == Work(moved=480 + 2880 + 1440 + 240, flops=8 * 360 * 4, gathered=11520)
    both = deformable_work(value, locations, weights, backward=True)
    # forward 5040; backward reads 4800 and a gradient of 240, writes 4800
    assert both == Work(moved=5040 + 4800 + 240 + 4800, flops=24 * 360 * 4, gathered=3 * 11520)


def test_linear_counts():
    # 2 * 5 tokens, K 3, N 4: tokens 120 bytes, weight 48, bias 16, output 160
    tensors = torch.zeros(2, 5, 3), torch.zeros(4, 3), torch.zeros(4)
    assert linear_work(*tensors) == Work(moved=120 + 48 + 16 + 160, flops=2 * 10 * 3 * 4)
    # backward reads tokens, weight and a gradient of 160, writes 184
    both = linear_work(*tensors, backward=True)
    assert both == Work(moved=344 + 120 + 48 + 160 + 184, flops=6 * 10 * 3 * 4)


def test_convolution_counts():
    # images 2 * 3 * 5 * 6 floats, weight 4 * 3 * 9, bias 4, output 2 * 4 * 5 * 6; tiles 2 * 2 * 2
    tensors = torch.zeros(2, 3, 5, 6), torch.zeros(4, 3, 3, 3), torch.zeros(4)
    forward = Work(moved=720 + 432 + 16 + 960, flops=2 * 36 * 8 * 3 * 4)
    assert convolution_work(*tensors) == forward
    both = convolution_work(*tensors, backward=True)
    # backward reads images, weight and a gradient of 960, writes 1168
    assert both == Work(forward.moved + 720 + 432 + 960 + 1168, flops=3 * forward.flops)


@pytest.mark.parametrize(("padding", "keys"), [(None, 12), (4, 8)])
def test_gaussian_counts(padding, keys):
    # B 2, H 3, N 5, S 6, D 4, Dv 8
    query, key, value = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 6, 4), torch.zeros(2, 3, 6, 8)
    gaussian = torch.zeros(2, 3, 5, 2), torch.zeros(2, 3, 5, 2)
    mask, mask_bytes = None, 0
    if padding:
        mask, mask_bytes = torch.zeros(2, 6, dtype=torch.bool), 12
        mask.view(-1)[:padding] = True
    inputs = 4 * (120 + 144 + 288 + 60 + 60)
    output = 4 * 240
    pairs = 3 * 5 * keys
    forward = gaussian_work(query, key, value, gaussian, mask)
    assert forward == Work(inputs + mask_bytes + output, pairs * (8 + 16 + 5))
    both = gaussian_work(query, key, value, gaussian, mask, backward=True)
    moved = forward.moved + 2 * inputs + mask_bytes + 2 * output
    assert both == Work(moved, forward.flops + pairs * (24 + 32 + 8))


def test_assignment_counts():
    # two layers, 5 queries, images of 3 and 7 targets: 3 and 5 pairs
    assert assignment_work(torch.zeros(2, 5, 10), [3, 7]) == Work(4 * 100 + 2 * 8 * 16)


def test_the_higher_bound_counts():
    ceilings = Ceilings(bandwidth=100.0, flops={"float32": 50.0, "bfloat16": 200.0})
    assert bound(Work(moved=200, flops=400), ceilings) == Bound(memory=2.0, compute=8.0)
    assert bound(Work(200, 400, precision="bfloat16"), ceilings) == Bound(2.0, 2.0)
    assert bound(Work(200, 400, precision="float16"), ceilings) == Bound(2.0, 8.0)
    assert Bound(2.0, 8.0).share(16.0) == 0.5
    assert Bound(2.0, 1.0).share(16.0) == 0.125


# --- timing -------------------------------------------------------------------------------------


class FakeClock:
    """Time that passes only while something is called."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def costs(self, name, *seconds):
        """Make a call that takes the next of some times, and the last of them ever after."""
        left = list(seconds)

        def run():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_contenders_take_turns():
    clock = FakeClock()
    runs = {"a": clock.costs("a", 9.0, 1.0, 1.0, 2.0, 3.0), "b": clock.costs("b", 5.0)}
    times = interleave(runs, Budget(rounds=3), clock=clock)
    assert "".join(clock.calls) == "aabb" + "ababab"
    assert times == {"a": [1.0, 2.0, 3.0], "b": [5.0, 5.0, 5.0]}


def test_a_turn_may_begin_with_a_call_that_is_not_timed():
    clock = FakeClock()
    runs = {"a": clock.costs("a", 9.0, 1.0, 5.0, 2.0, 6.0, 3.0), "b": clock.costs("b", 4.0)}
    times = interleave(runs, Budget(rounds=2), lead_in=True, clock=clock)
    assert "".join(clock.calls) == "aabb" + "aabbaabb"
    assert times == {"a": [2.0, 3.0], "b": [4.0, 4.0]}


def test_short_calls_are_repeated_within_a_sample():
    clock = FakeClock()
    times = interleave({"a": clock.costs("a", 2**-9)}, Budget(rounds=2), clock=clock)
    assert len(clock.calls) == 2 + 2 * 3  # 3 * 2 ms are more than 5 ms
    assert times == {"a": [2**-9, 2**-9]}


def test_a_sample_waits_for_the_device():
    clock = FakeClock()
    synchronize = clock.costs("s", 0.5)
    times = interleave(
        {"a": clock.costs("a", 1.0)}, Budget(rounds=1), synchronize=synchronize, clock=clock
    )
    assert "".join(clock.calls) == "sas" * 3
    assert times == {"a": [1.5]}


@pytest.mark.parametrize(("seconds", "rounds"), [(20.5, 21), (1.0, FEWEST_ROUNDS)])
def test_rounds_begin_until_time_is_up(seconds, rounds):
    clock = FakeClock()
    times = interleave({"a": clock.costs("a", 1.0)}, Budget(seconds=seconds), clock=clock)
    assert len(times["a"]) == rounds


def test_median_quartiles_and_paired_ratios():
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)
    # medians are 2 and 8, but each round's peer is 2, 4 and 5 times slower
    assert ratios([1.0, 2.0, 4.0], [2.0, 8.0, 20.0]) == Spread(4.0, 3.0, 4.5)
