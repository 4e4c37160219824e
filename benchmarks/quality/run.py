"""Run the cells that a stage still needs, and keep each as a line of JSON; stop it at any time, start it again.

    python benchmarks/quality/run.py --stage 1 --minutes 30
    python benchmarks/quality/run.py --quick          # half a minute; whether everything runs, on tiny tasks

Finished cells are never run again, and several processes may work on the same stage.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from harness import environment
from tqdm.auto import tqdm

from quality import plan, quick
from quality.cells import Cell, Store
from quality.methods import METHODS
from quality.tasks import TASKS
from quality.tasks.task import Task
from quality.training import train

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CACHE = HERE / "cache"
SECONDS_TO_PLAN = 30
"""After so long it is asked anew what comes next: rates chosen meanwhile bring cells that can be reported."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--stage",
        type=int,
        choices=plan.STAGES,
        help="1 selects methods, 2 and 3 compare them, 4 allocates ranks, 5 runs peers that "
        "were not selected, 6 settles disputed rates, 7 translates with a real model",
    )
    what.add_argument("--rule", action="store_true", help="WaRA at LoRA's rates, scaled by a rule and not")
    what.add_argument("--quick", action="store_true", help="tiny tasks and few methods, in another folder")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time that it may take (default: no end)")
    parser.add_argument("--results", type=Path, help="folder of the JSON lines (default: the one with the kept ones)")
    return parser.parse_args()


def run_cell(cell: Cell, task: Task) -> dict[str, object]:
    """Train a cell and measure it; `parameters` is None where the method's smallest size is above the budget."""
    start = time.perf_counter()
    problem = task.problem(cell.seed)
    torch.manual_seed(cell.seed)
    built = METHODS[cell.method].build(problem, cell.budget)
    result: dict[str, object] = {"validation": None, "test": None, "parameters": built and built.parameters}
    if built and train(problem, built, cell.rate):
        for split in ("validation", "test"):
            score = problem.score(built.model, problem.splits[split])
            result[split] = score if score < float("inf") else None  # neither infinite nor NaN
        if problem.further and cell.seed in plan.SEEDS[cell.family]:
            result |= problem.further(built.model)
    return {**result, "seconds": round(time.perf_counter() - start, 3), **environment()}


class Clock:
    """Seconds of a cell by family and method, to say how long the rest takes."""

    def __init__(self, store: Store) -> None:
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        for cell, result in store.results().items():
            self.add(cell, result)

    def add(self, cell: Cell, result: dict[str, object]) -> None:
        for key in ((cell.family, cell.method), (cell.family, "")):
            self.seconds[key].append(float(str(result["seconds"])))

    def expected(self, cell: Cell) -> float:
        """The mean of what is known of cells like it, and 0 where nothing is."""
        known = self.seconds.get((cell.family, cell.method)) or self.seconds.get((cell.family, "")) or [0.0]
        return sum(known) / len(known)


def work(pending: Callable[[], list[Cell]], tasks: dict[str, Task], store: Store, minutes: float) -> int:
    """Run what is pending until nothing is, or the time is over; returns the number of cells that failed."""
    end = time.monotonic() + 60 * minutes
    clock = Clock(store)
    failed: dict[Cell, Exception] = {}
    announced = False
    with tqdm(unit="cell", smoothing=0) as bar:
        while cells := [cell for cell in pending() if cell not in failed]:
            bar.total = bar.n + len(cells)
            ran = 0
            plan_again = time.monotonic() + SECONDS_TO_PLAN
            for cell in cells:
                if time.monotonic() > plan_again:
                    break
                if time.monotonic() + clock.expected(cell) > end:
                    bar.write(f"The time is over; {len(cells) - ran} or more cells are left. Run it again to go on.")
                    return len(failed)
                entry = plan.Entry(cell.task, cell.method, cell.budget)
                if not plan.fits(entry, store.results()):
                    continue
                with store.claim(cell) as mine:
                    if not mine:
                        continue
                    bar.set_description(f"{cell.task}, {cell.method}, {cell.budget:g}, {cell.rate:g}")
                    try:
                        result = run_cell(cell, tasks[cell.task])
                    except Exception as error:
                        failed[cell] = error
                        bar.write(f"{cell} failed: {type(error).__name__}: {error}")
                        continue
                    store.append(cell, result)
                ran += 1
                clock.add(cell, result)
                bar.update()
                if not announced:
                    announced = True
                    left = sum(clock.expected(cell) for cell in cells[1:]) / 60
                    bar.write(
                        f"The first cell took {result['seconds']} s. {len(cells) - 1} more are known to be needed: "
                        f"about {left:.1f} minutes, and seeds and wider rates come after them."
                    )
            if not ran:
                time.sleep(1)  # other processes work on them, and their results decide what comes next
    return len(failed)


def main() -> None:
    args = parse_arguments()
    # Said once for each of thousands of models; none is about what is measured.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    store = Store(args.results or (CACHE / "quick" if args.quick else RESULTS), CACHE / "locks")
    tasks: dict[str, Task] = quick.TASKS if args.quick else TASKS

    def pending() -> list[Cell]:
        results = store.results()
        if args.rule:
            cells = [cell for by_seed in plan.rule_cells(results).values() for cell in by_seed.values()]
            return sorted((cell for cell in cells if cell not in results), key=lambda cell: cell.seed)
        wanted = quick.wanted() if args.quick else plan.stage(args.stage, results)
        return plan.pending(wanted, results, tasks, further=args.stage == plan.SETTLING)

    try:
        pending()
    except ValueError as error:
        sys.exit(f"run.py: error: {error}")
    if work(pending, tasks, store, args.minutes):
        sys.exit("run.py: error: some cells failed, see above; run it again to try them again")


if __name__ == "__main__":
    main()
