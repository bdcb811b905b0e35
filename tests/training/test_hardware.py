"""The machine's rate is right beside other processes, and decoding takes the number of threads that is faster at the
moment."""

import itertools
import time

import pytest
import torch

from core import hardware
from core.inference import convert_for_inference
from model import GPT, GPTConfig


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, [0.0], that time.perf_counter gives: calls under test move it."""
    now = [0.0]
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def two_threads():
    """Two threads of OpenMP during a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def bursts(clock, seconds):
    """(a call that takes the next of these seconds each time, the list of those it took)."""
    taken, coming = [], itertools.cycle(seconds)

    def call():
        taken.append(next(coming))
        clock[0] += taken[-1]

    return call, taken


# ---- the rate of products ------------------------------------------------------------------------


def test_one_burst_in_ten_is_undisturbed(clock):
    """The rate is that of the bursts that nothing interrupted, a few of which must agree."""
    call, taken = bursts(clock, [0.002 + 0.0005 * n for n in range(9)] + [0.001])
    assert hardware.shortest(call, budget=0.5) == pytest.approx(0.001)
    assert taken[1:].count(0.001) == 5 and clock[0] < 0.5


def test_all_bursts_undisturbed(clock):
    call, taken = bursts(clock, [9.0] + [0.0011, 0.001] * 40)  # the first is not timed
    assert hardware.shortest(call) == pytest.approx(0.001)
    assert clock[0] - 9 == pytest.approx(0.05, abs=0.0021)


@pytest.mark.parametrize("seconds, calls", [([0.05 * n for n in range(1, 9)], 3), ([3.0], 2)])
def test_bursts_that_do_not_agree_end_with_the_budget(clock, seconds, calls):
    call, taken = bursts(clock, seconds)
    assert hardware.shortest(call, budget=0.25) == pytest.approx(taken[1])
    assert len(taken) == calls


@pytest.mark.parametrize("rate, sizes", [(1e9, [128]), (9e10, [128, 256, 512]), (1e12, [128, 256, 512, 1024])])
def test_a_burst_stays_short(monkeypatch, rate, sizes):
    """Where bfloat16 is emulated at 1 GFLOP/s, a product of 1024 x 1024 matrices would take two seconds."""
    seen = []

    def shortest(call, device):
        seen.append(len(call()))
        return 2 * seen[-1] ** 3 / rate

    monkeypatch.setattr(hardware, "shortest", shortest)
    assert hardware.burst_rate("cpu", "float32") == pytest.approx(rate) and seen == sizes


def test_threads_do_not_wait_for_each_other(monkeypatch, two_threads):
    """Each has a product of its own, computed in it alone; their rates add up, and the number of threads is as
    before."""
    threads = []
    monkeypatch.setattr(hardware, "burst_rate", lambda *machine: threads.append(torch.get_num_threads()) or 7e9)
    hardware.matmul_rate.cache_clear()
    assert hardware.matmul_rate("cpu", "float32") == 14e9 and threads == [1, 1] and torch.get_num_threads() == 2
    hardware.matmul_rate.cache_clear()


def test_the_rate_is_measured_quickly():
    began = time.perf_counter()
    assert all(hardware.burst_rate("cpu", dtype) > 1e6 for dtype in ("float32", "bfloat16"))
    assert time.perf_counter() - began < 5  # 1 s, were the machine this test's alone


# ---- threads for decoding ------------------------------------------------------------------------


def drive(cost, tokens):
    """Numbers of threads, and seconds, of so many tokens that take cost(number, second) seconds each."""
    numbers = hardware.faster_number(1, 2)
    number, used, now = next(numbers), [], 0.0
    for _ in range(tokens):
        used.append(number)
        now += (seconds := cost(number, now))
        number = numbers.send(seconds)
    return used, now


def test_all_threads_on_an_idle_machine():
    """Trials of one thread cost little: 405 tokens/s with two threads, 260 with one."""
    used, seconds = drive(lambda number, now: 1 / (405 if number == 2 else 260), 500)
    assert used[:9] == [2, 1, 1, 1, 1, 2, 2, 2, 2] and used.count(1) > 4  # it is tried again
    assert 500 / seconds > 0.96 * 405


def test_one_thread_on_a_busy_machine():
    """Two threads give 4 tokens/s, one gives 250; of a slow trial one token is enough."""
    used, seconds = drive(lambda number, now: 1 / (4 if number == 2 else 250), 500)
    assert used[:9] == [2, 1, 1, 1, 1, 2, 1, 1, 1] and 480 / (seconds - 0.25) > 0.85 * 250


def test_threads_follow_the_load():
    """Busy from the first second to the fifth, with the tokens that then take long."""
    starts = []

    def cost(number, now):
        busy = 1 <= now < 5
        starts.append((now, number))
        return 1 / (250 if number == 1 else 20 if busy else 405)

    drive(cost, 3000)
    share = {name: [number for now, number in starts if since <= now < until] for name, since, until in (
        ("before", 0, 1), ("during", 1.3, 5), ("after", 8, 9))}
    mean = {name: sum(numbers) / len(numbers) for name, numbers in share.items()}
    assert mean["before"] > 1.9 and mean["during"] < 1.1 and mean["after"] > 1.9


def test_tokens_come_through(monkeypatch, two_threads):
    """All tokens in order; the number of threads is as before for the caller, also where it stops early or decoding
    fails."""
    monkeypatch.setattr(hardware, "THREADS", 2)
    within = []

    def tokens():
        for n in range(30):
            within.append(torch.get_num_threads())
            yield torch.tensor([n])
        raise ValueError("decoding failed")

    drawn = hardware.adapt_threads(tokens(), "cpu")
    got = []
    with pytest.raises(ValueError, match="decoding failed"):
        for token in drawn:
            got.append(int(token))
            assert torch.get_num_threads() == 2
    assert got == list(range(30)) and set(within) == {1, 2} and torch.get_num_threads() == 2
    assert len(list(hardware.adapt_threads(iter(range(20)), "cpu"))) == 20
    drawn = hardware.adapt_threads(tokens(), "cpu")
    assert [int(next(drawn)) for _ in range(3)] == [0, 1, 2]
    drawn.close()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("device, threads", [("cuda", 2), ("cpu", 1)])
def test_nothing_to_choose(monkeypatch, device, threads):
    monkeypatch.setattr(hardware, "THREADS", threads)
    monkeypatch.setattr(torch, "set_num_threads", None)
    assert list(hardware.adapt_threads(iter("abc"), device)) == ["a", "b", "c"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_does_not_change_the_text(two_threads, dtype):
    """Which number is faster is by chance, and must not decide what is drawn: the logits are equal to the bit."""
    torch.manual_seed(0)
    model = convert_for_inference(GPT(GPTConfig(vocab_size=256, n_layer=2, n_head=4, n_embd=256, block_size=64)), dtype)
    logits = {}
    for number in (1, 2):
        torch.set_num_threads(number)
        caches, drawn = model.new_caches(), []
        for n in range(12):
            drawn.append(model(torch.tensor([[7 * n, 7 * n + 1]] if n == 0 else [[7 * n]]), caches=caches)[0][:, -1])
        logits[number] = torch.cat(drawn)
    assert torch.equal(logits[1], logits[2]) and logits[1].std() > 0
