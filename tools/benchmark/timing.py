"""Clocks, interleaved rounds, and peak memory."""

import gc
import random
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

Part = Callable[[], object]
WARM_UP = 2  # rounds
FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2 cache


class Clock:
    def __init__(self, kind: str, device: str) -> None:
        self.cuda = device.startswith('cuda')
        self.now = time.process_time if kind == 'process' else time.perf_counter
        self.flush = (
            torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.cuda else None
        )

    def prepare(self) -> None:
        """Before a step: nothing of the last one is left in a GPU's cache."""
        if self.flush is not None:
            self.flush.zero_()

    def time(self, call: Part) -> float:
        """Milliseconds of a call."""
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)
        begin = self.now()
        call()
        return (self.now() - begin) * 1e3


Step = Callable[[int], Mapping[str, float]]


def use_device(device: str) -> None:
    """Makes a card the one whose clocks and memory are read, which is the first one otherwise."""
    if device.startswith('cuda:'):
        torch.cuda.set_device(device)


def interleave(steps: Mapping[str, Step], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Run all steps in every round, in a new order each time, so that drift meets all alike."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in steps}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for index in range(WARM_UP + repeats):
            for name in order.sample(list(steps), len(steps)):
                for part, milliseconds in steps[name](index).items():
                    if index >= WARM_UP:
                        times[name].setdefault(part, []).append(milliseconds)
    finally:
        gc.enable()
    return times


def ratio(times: list[float], reference: list[float]) -> float:
    return median(times) / median(reference)


def peak_memory(step: Part, device: str) -> int:
    """Bytes that one call allocates at its peak, over what was there before."""
    if device.startswith('cuda'):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    kineto = profile.profiler
    assert kineto is not None and kineto.kineto_results is not None
    events = [e for e in kineto.kineto_results.events() if e.name() == '[memory]']
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
