"""What live views cost a training run: CPU seconds of the process per step, with and without views being pulled.

    python tests/benchmarks/live_cost.py [--pairs 60] [--steps 2]

One run of `toy_v3` is held between stretches of `steps` steps. In every pair one stretch is made with three views
(dashboard, routing, curves) pulled ten times a second, each frame built and encoded as for a front end (not serialized
by a comm), and one without, in alternating order. One thread trains, so that no CPU second is spent on waiting for
another. Printed: what the thread that answers the pulls spent itself, and last the upper end of the 95 % interval of
the median extra cost of the whole process, by the sign test: one disturbed pair does not move it. Stretches are short
and pairs many, since the machine's own speed drifts by some percent within seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from workbench import live
from workbench.train.recipes import toy_v3
from workbench.widgets import curves, dashboard, routing
from workbench.widgets.base import View

PULLS_PER_SECOND = 10


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--pairs", type=int, default=60)
    arguments.add_argument("--steps", type=int, default=2)
    options = arguments.parse_args()
    if options.pairs < 10:
        arguments.error("at least 10 pairs are needed")
    total = (2 * options.pairs + 1) * options.steps
    never = total + 1
    recipe = replace(
        toy_v3(), steps=total + 1, evaluate_every=never, checkpoint_every=never, evaluation_batches=1, num_threads=1
    )
    with tempfile.TemporaryDirectory() as folder:
        run = live.start(recipe, Path(folder) / "cost", paused=True)
        views = [dashboard(run, live=True), routing(run, live=True), curves(run, live=True)]
        with contextlib.redirect_stdout(io.StringIO()):
            for view in views:
                view.show()
        cpu_per_step(run, [], options.steps)
        ratios: list[float] = []
        shares: list[float] = []
        for pair in range(options.pairs):
            order = (views, []) if pair % 2 == 0 else ([], views)
            spent = {bool(shown): cpu_per_step(run, shown, options.steps) for shown in order}
            plain, shown = spent[False], spent[True]
            ratios.append(shown.process / plain.process - 1)
            shares.append((shown.puller - plain.puller) / plain.process)
            print(f"pair {pair + 1:3}: {plain.process * 1000:7.1f} ms of CPU per step, {ratios[-1]:+7.2%} with views")
        run.stop()
        run.wait()
    print(f"the pulls' own thread {statistics.median(shares):+.2%} of a step (median)")
    print(f"median extra cost {statistics.median(ratios):+.2%} over {len(ratios)} pairs")
    print(f"95 % upper bound {upper_bound_of_median(ratios):.2%}")


def upper_bound_of_median(values: list[float]) -> float:
    """The smallest value that the true median exceeds with a probability of at most 5 %, whatever the distribution."""
    ordered, count = sorted(values), len(values)
    for rank in range(count):
        # The median lies above ordered[rank] only if at most count - rank - 1 values fell above the median.
        if sum(math.comb(count, above) for above in range(count - rank)) / 2**count <= 0.05:
            return ordered[rank]
    raise ValueError(f"{count} pairs are too few for a bound")


class Spent(NamedTuple):
    """CPU seconds per step: of the whole process, and of the thread that pulls views (or none)."""

    process: float
    puller: float


def cpu_per_step(run: live.Run, views: list[View], steps: int) -> Spent:
    """What `steps` steps cost during which `views` are pulled."""
    began_at = run.snapshot().step
    ended = threading.Event()
    pulls: list[float] = []
    puller = threading.Thread(target=lambda: pulls.append(pull(run, views, ended)))
    began = time.process_time()
    puller.start()
    for _ in range(steps):
        run.step()
    run.wait_for(lambda now: now.step >= began_at + steps and now.status == "paused")
    spent = time.process_time() - began
    ended.set()
    puller.join()
    return Spent(spent / steps, pulls[0] / steps)


def pull(run: live.Run, views: list[View], ended: threading.Event) -> float:
    """The messages of a visible front end, as its widget receives them; only the browser itself is missing.

    Returns the CPU seconds of the thread that it runs on.
    """
    have: int | None = None
    while not ended.wait(1 / PULLS_PER_SECOND):
        newest = run.snapshot().version
        for view in views:
            assert view.widget is not None
            view.widget._handle_custom_msg({"kind": "pull", "have": have}, [])
        have = newest
    return time.thread_time()


if __name__ == "__main__":
    main()
