"""The command behind ``plain`` and ``residual``: which runs, in which order, by whom."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import shlex
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from common import images as data
from common.measure import machine
from common.networks import ACTIVATIONS
from convspectra.auditing._workers import end_with_parent
from convspectra.paper.images import ImageSet
from experiments.stable_gradients import table
from experiments.stable_gradients.arms import arms_for
from experiments.stable_gradients.training import Record, Run, Settings, train

OUT = Path("docs/experiments/stable_gradients")
"""Where the page is written."""


@dataclass(frozen=True)
class Plan:
    """The sizes of a table."""

    depths: tuple[int, ...]
    activations: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Settings


FULL = Plan((10, 20, 50, 100), tuple(ACTIVATIONS), (0, 1, 2), Settings())
"""The plan of the published tables."""
QUICK = Plan(
    (4,),
    ("relu",),
    (0,),
    Settings(
        channels=3,
        steps=4,
        batch_size=8,
        projection_interval=2,
        observations=3,
        gradient_images=16,
        train_images=40,
        test_images=20,
    ),
)
"""The plan of the tests: every branch, in seconds."""


def runs(network: str, arms: Sequence[str], plan: Plan) -> list[Run]:
    """All runs of a table, a seed after the other, so that a part of them is a balanced table."""
    return [
        Run(network, arm, depth, activation, seed)
        for seed, depth, activation, arm in itertools.product(
            plan.seeds, plan.depths, plan.activations, arms
        )
    ]


def main(network: str, description: str, argv: Sequence[str] | None = None) -> list[table.Row]:
    """Parse the arguments, do the runs that the CSV lacks; returns the new rows."""
    parser = _parser(network, description)
    args = parser.parse_args(argv)
    plan = QUICK if args.quick else FULL
    try:
        if args.data is None:
            raise ValueError(f"expected --data: {data.WHAT_TO_GIVE}")
        changed = {
            field.name: getattr(args, field.name)
            for field in fields(Settings)
            if getattr(args, field.name) is not None
        }
        plan = Plan(
            tuple(args.depths or plan.depths),
            tuple(args.activations or plan.activations),
            tuple(args.seeds or plan.seeds),
            replace(plan.settings, **changed),
        )
        images = data.load(args.data, plan.settings.train_images, plan.settings.test_images)
        path = args.out / f"{network}.csv"
        known = {row.key for row in table.read(path)}
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    asked = runs(network, args.arms or arms_for(network), plan)
    missing = [run for run in asked if (run, images.name, plan.settings) not in known]
    command = _command(network, args, plan, changed)
    console = Console(stderr=True)
    console.print(f"{len(asked)} runs, {len(asked) - len(missing)} of them in {path}")
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("runs", total=len(missing))
        for run, record in _records(missing, images, plan.settings, args.workers):
            rows.append(table.Row(run, images.name, plan.settings, machine(), command, record))
            table.append(path, rows[-1:])
            progress.advance(task)
            progress.console.print(_line(run, record), markup=False, highlight=False)
    return rows


def _command(network: str, args: argparse.Namespace, plan: Plan, changed: dict[str, object]) -> str:
    """A command that does all the runs of this one, and others of the table, anywhere."""
    words = ["python", "-m", f"experiments.stable_gradients.{network}"]
    words += ["--data", args.data.resolve().name, *(["--quick"] if args.quick else [])]
    usual = QUICK if args.quick else FULL
    for name in ("depths", "activations", "seeds"):
        if not set(getattr(plan, name)) <= set(getattr(usual, name)):
            words += [f"--{name}", *map(str, getattr(plan, name))]
    for name, value in changed.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return shlex.join(words)


def _parser(network: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.stable_gradients.{network}", description=description
    )
    parser.add_argument("--data", type=Path, help=data.WHAT_TO_GIVE.removeprefix("--data takes "))
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the CSV")
    parser.add_argument("--quick", action="store_true", help="tiny networks, a few steps")
    parser.add_argument("--depths", type=int, nargs="+")
    parser.add_argument("--activations", nargs="+", choices=tuple(ACTIVATIONS))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=arms_for(network),
        metavar="ARM",
        help="of: " + ", ".join(arms_for(network)),
    )
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    changes = parser.add_argument_group("settings", "a row is known again by all of them")
    for field in fields(Settings):
        option = "--" + field.name.replace("_", "-")
        default = getattr(FULL.settings, field.name)
        changes.add_argument(option, type=type(default), help=f"default {default}")
    return parser


def _records(
    missing: Sequence[Run], images: ImageSet, settings: Settings, workers: int
) -> Iterator[tuple[Run, Record]]:
    if workers <= 1:
        for run in missing:
            yield run, train(run, images, settings)
        return
    # Spawned: a fork of a process in which torch has threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin_worker, (images, settings)) as pool:
        futures = {pool.submit(_work, run): run for run in missing}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_given: tuple[ImageSet, Settings]
"""What every run of this worker process shares; sent once, not with each run."""


def _begin_worker(images: ImageSet, settings: Settings) -> None:
    global _given
    _given = images, settings
    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(run: Run) -> Record:
    return train(run, *_given)


def _line(run: Run, record: Record) -> str:
    accuracy = f"{100 * record.accuracies[-1]:.1f}%" if record.accuracies else "no accuracy"
    status = "" if record.status == "finished" else f", {record.status} {record.note}"
    return (
        f"seed {run.seed}, {run.depth} layers, {run.activation}, {run.arm}: {accuracy}, "
        f"{record.seconds:.1f} s{status}"
    )
