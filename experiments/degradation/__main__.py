"""He et al.'s degradation: plain-20, plain-56 and plain-110 on CIFAR-10.

``python -m experiments.degradation --data FOLDER`` appends a row an epoch to degradation.csv and
goes on where it stopped when it is called again: each epoch leaves a checkpoint. The learning rate
of every arm and depth is that of the same grid with the smallest loss after `TUNING_STEPS` steps,
chosen with seed 0. FOLDER holds CIFAR-10 in its binary version or as a folder of images.
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
from convspectra.paper.images import ImageSet
from convspectra.text import markdown_table
from experiments.degradation.figure import draw
from experiments.degradation.networks import ARMS
from experiments.degradation.runs import Epoch, Run, Settings, Training

OUT = Path("docs/experiments/degradation")
GRID = (1.0, 3.0, 10.0)
TUNING_STEPS = 150
"""Steps of the runs that choose a rate: 2 to 3% of a whole one."""
QUICK = Settings(width=4, epochs=2, batch_size=10, train_images=40, test_images=20)
COLUMNS = (
    *(field.name for field in fields(Run)),
    *(field.name for field in fields(Epoch)),
    *(field.name for field in fields(Settings)),
    "images",
    "code",
)


def main(argv: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Do the epochs that the CSV lacks; returns all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=data.WHAT_TO_GIVE)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--checkpoints", type=Path, default=Path(".cache/degradation"))
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56, 110])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rates", type=float, nargs="+", default=list(GRID))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--width", type=int, help="channels of the first third; 8 by default")
    parser.add_argument("--epochs", type=int, help="10 by default")
    parser.add_argument("--quick", action="store_true", help="tiny networks, two epochs")
    args = parser.parse_args(argv)
    settings = QUICK if args.quick else Settings()
    given = {"width": args.width, "epochs": args.epochs}
    settings = replace(settings, **{k: v for k, v in given.items() if v is not None})
    images = data.load(args.data, settings.train_images, settings.test_images, largest_side=32)
    path = args.out / "degradation.csv"
    rows = read(path, COLUMNS)
    console = Console(stderr=True)
    torch.set_num_threads(1)
    code = code_version()  # of what runs, whatever is checked out meanwhile
    for seed, depth, arm in itertools.product(args.seeds, args.depths, args.arms):
        rate = best_rate(arm, depth, args.rates, images, settings, args.checkpoints)
        run = Run(arm, depth, rate, seed)
        key = {**asdict(run), **asdict(settings), "images": images.name}
        done = [row for row in rows if all(row[name] == str(value) for name, value in key.items())]
        if len(done) >= settings.epochs:
            continue
        training = Training(run, images, settings)
        saved = args.checkpoints / f"{arm}-{depth}-{rate}-{seed}-{settings.width}.pt"
        if done and saved.exists():
            training.load(saved)
        rows = [row for row in rows if row not in done[training.done :]]
        while training.done < settings.epochs:
            epoch = training.epoch()
            row = {**key, **asdict(epoch), "code": code}
            rows.append({name: str(row[name]) for name in COLUMNS})
            training.save(saved)
            write(path, rows, COLUMNS)
            console.print(f"{run}, {epoch.epoch}: {100 * epoch.accuracy:.1f}%", highlight=False)
    finish(args.out, rows)
    return rows


def best_rate(
    arm: str,
    depth: int,
    rates: Sequence[float],
    images: ImageSet,
    settings: Settings,
    folder: Path,
) -> float:
    """The rate of the smallest loss at the end of a short run; kept in a file."""
    if len(rates) == 1:
        return rates[0]
    path = folder / "rates.csv"
    columns = ("arm", "depth", "width", "images", "rate", "loss")
    known = read(path, columns)
    found: dict[float, float] = {}
    for rate in rates:
        key = {
            "arm": arm,
            "depth": str(depth),
            "width": str(settings.width),
            "images": images.name,
            "rate": str(rate),
        }
        row = next((r for r in known if all(r[k] == v for k, v in key.items())), None)
        if row is None:
            few = TUNING_STEPS * settings.batch_size
            part = replace(
                images,
                train_images=images.train_images[:few],
                train_labels=images.train_labels[:few],
                test_images=images.test_images[:500],
                test_labels=images.test_labels[:500],
            )
            epoch = Training(Run(arm, depth, rate, 0), part, replace(settings, epochs=1)).epoch()
            row = {**key, "loss": str(epoch.loss)}
            known.append(row)
            write(path, known, columns)
        found[rate] = float(row["loss"])
    return min(rates, key=lambda rate: found[rate] if found[rate] == found[rate] else float("inf"))


def summary(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """One line an arm and depth: the last epoch, mean and least over the seeds."""
    last: dict[tuple[str, int, str], dict[str, str]] = {}
    for row in rows:
        last[row["arm"], int(row["depth"]), row["seed"]] = row
    groups: dict[tuple[str, int], list[dict[str, str]]] = {}
    for (arm, depth, _), row in last.items():
        groups.setdefault((arm, depth), []).append(row)
    table = []
    for (arm, depth), found in groups.items():
        accuracies = [float(row["accuracy"]) for row in found]
        table.append(
            {
                "arm": arm,
                "layers": depth,
                "epochs": min(int(row["epoch"]) for row in found),
                "test accuracy": f"{100 * sum(accuracies) / len(found):.1f}%",
                "least": f"{100 * min(accuracies):.1f}%",
                "seeds": len(found),
                "training loss": f"{sum(float(r['loss']) for r in found) / len(found):.3f}",
                "gradient ratio": f"{sum(float(r['ratio']) for r in found) / len(found):.1e}",
                "learning rate": f"{float(found[0]['learning_rate']):.1e}",
                "CPU s an epoch": f"{sum(float(r['seconds']) for r in found) / len(found):.0f}",
            }
        )
    return sorted(table, key=lambda row: (row["layers"], ARMS.index(row["arm"])))


def finish(folder: Path, rows: Sequence[dict[str, str]]) -> None:
    """The page and the figure from all rows."""
    table = summary(rows)
    first, codes = rows[0], sorted({row["code"] for row in rows})
    page = [
        "# Degradation of plain networks on CIFAR-10",
        "",
        "Plain networks of 20, 56 and 110 layers from He et al., "
        '"Deep residual learning for image recognition" (CVPR 2016, arXiv:1512.03385), Section '
        f"4.2: {first['width']}, {2 * int(first['width'])} and {4 * int(first['width'])} channels "
        f"where the paper has 16, 32 and 64; {first['images']}, batches of {first['batch_size']}, "
        "mirrored and shifted images, Adam with one cycle of the learning rate, which is the best "
        f"of {', '.join(f'{rate:g}' for rate in GRID)} times 3 over the sum of the fan-ins after "
        f"{TUNING_STEPS} steps. Chance is 10%.",
        "",
        "Command: `python -m experiments.degradation --data FOLDER`; code: "
        + ", ".join(codes)
        + ".",
        "",
        "![Test accuracy by epoch](degradation.png)",
        "",
        markdown_table(tuple(table[0]), table),
    ]
    (folder / "degradation.md").write_text("\n".join(page), encoding="utf-8")
    draw(rows, folder / "degradation")


if __name__ == "__main__":
    main()
