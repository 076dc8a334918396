"""Which starts and penalties let plain networks train, at any depth.

``python -m experiments.any_depth --data FOLDER`` appends a row a run to any_depth.csv, goes on
where it stopped when it is called again, and writes the table and the figure anew. FOLDER holds
Fashion-MNIST in IDX files, or another set that experiments.stable_gradients reads. The learning
rate of every arm is the best of the same grid: 1/3, 1 and 3 times the one that `cs.prepare`
suggests, chosen with the first seed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from common import images as data
from common.growing_tables import code_version, read, write
from convspectra.text import markdown_table
from experiments.any_depth.figure import draw
from experiments.any_depth.runs import ACTIVATIONS, ARMS, STARTS, Outcome, Run, Settings, train

OUT = Path("docs/experiments/any_depth")
GRID = (1 / 3, 1.0, 3.0)
QUICK = Settings(channels=4, steps=3, batch_size=8, train_images=40, test_images=20)
COLUMNS = (
    *(field.name for field in fields(Run)),
    *(field.name for field in fields(Outcome)),
    *(field.name for field in fields(Settings)),
    "images",
    "code",
)


def main(argv: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Do the runs that the CSV lacks; returns all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=data.WHAT_TO_GIVE)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(STARTS))
    parser.add_argument("--rates", type=float, nargs="+", default=list(GRID))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of training; 150 by default")
    parser.add_argument("--batch-size", type=int, help="64 by default")
    parser.add_argument("--quick", action="store_true", help="tiny networks, a few steps")
    args = parser.parse_args(argv)
    settings = QUICK if args.quick else Settings()
    given = {"steps": args.steps, "batch_size": args.batch_size}
    settings = replace(settings, **{k: v for k, v in given.items() if v is not None})
    images = data.load(args.data, settings.train_images, settings.test_images)
    path = args.out / "any_depth.csv"
    rows = read(path, COLUMNS)
    console = Console(stderr=True)
    torch.set_num_threads(1)
    code = code_version()  # of what runs, whatever is checked out meanwhile
    for seed, depth, activation, arm, rate in itertools.product(
        args.seeds, args.depths, args.activations, args.arms, args.rates
    ):
        run = Run(arm, activation, depth, round(rate, 4), seed)
        key = {**asdict(run), **asdict(settings), "images": images.name}
        if any(all(row[name] == str(value) for name, value in key.items()) for row in rows):
            continue
        outcome = train(run, images, settings)
        row = {**key, **asdict(outcome), "code": code}
        rows.append({name: str(row[name]) for name in COLUMNS})
        write(path, rows, COLUMNS)
        console.print(f"{run}: {100 * outcome.accuracy:.1f}%", highlight=False)
    finish(args.out, rows)
    return rows


def best(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """One line an arm, activation and depth, at its best rate: mean, least and number of seeds."""
    groups: dict[tuple[str, str, int, int], dict[str, list[dict[str, str]]]] = {}
    for row in rows:
        key = row["activation"], row["arm"], int(row["depth"]), int(row["steps"])
        groups.setdefault(key, {}).setdefault(row["rate"], []).append(row)
    table = []
    for (activation, arm, depth, steps), rates in groups.items():
        chosen = max(rates.values(), key=lambda found: _mean(found, "accuracy"))
        accuracies = [float(row["accuracy"]) for row in chosen]
        table.append(
            {
                "activation": activation,
                "arm": arm,
                "depth": depth,
                "steps": steps,
                "test accuracy": f"{100 * _mean(chosen, 'accuracy'):.1f}%",
                "least": f"{100 * min(accuracies):.1f}%",
                "seeds": len(chosen),
                "learning rate": f"{float(chosen[0]['learning_rate']):.1e}",
                "rates tried": len(rates),
                "gradient ratio, start": f"{_mean(chosen, 'ratio_before'):.1e}",
                "gradient ratio, end": f"{_mean(chosen, 'ratio_after'):.1e}",
                "s a step": f"{_mean(chosen, 'seconds_a_step'):.3f}",
            }
        )
    return sorted(table, key=lambda row: (row["activation"], row["depth"], ARMS.index(row["arm"])))


def _mean(rows: Sequence[dict[str, str]], column: str) -> float:
    return sum(float(row[column]) for row in rows) / len(rows)


def finish(folder: Path, rows: Sequence[dict[str, str]]) -> None:
    """The page and the figure from all rows."""
    table = best(rows)
    codes = sorted({row["code"] for row in rows})
    page = [
        "# Plain networks of any depth",
        "",
        "3 x 3 convolutions, no shortcuts, no normalization except in the arm of that name; "
        f"{rows[0]['images']}, {rows[0]['channels']} channels, batches of {rows[0]['batch_size']}. "
        "The learning rate of every arm is the best of the same grid. Chance is 10%. The figure "
        "has the starts only; peers and the paper's penalties are in the table.",
        "",
        "Command: `python -m experiments.any_depth --data FOLDER`; code: " + ", ".join(codes) + ".",
        "",
        "![Test accuracy by depth](any_depth.png)",
        "",
        markdown_table(tuple(table[0]), table),
    ]
    (folder / "any_depth.md").write_text("\n".join(page), encoding="utf-8")
    draw(table, folder / "any_depth")


if __name__ == "__main__":
    main()
