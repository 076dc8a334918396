"""Singular values of convolutional layers: ours with their certificates, beside what else there is.

``python -m benchmarks.spectra [--quick] [--seconds 60] [--seed 0] [--out docs/benchmarks]`` prints
a table and writes ``spectra.md``, ``spectra.json``, ``spectra.svg`` and ``resnet50.csv``. Times are
compared within one run: with an LU factorization of the border matrix's order, with plain Lanczos,
with the peers of `benchmarks.peers`. Everything runs in fresh processes of two threads; a peer gets
``--seconds`` (starting Python included), what is ours 20 times as long.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import layers, report
from benchmarks.layers import Layer, border_order
from benchmarks.peers import PEERS, PEERS_OF_TEN
from benchmarks.report import OURS, Row
from common.measure import call, machine

PATIENCE = 20
"""Times `--seconds` that a call may take before it is stopped. A choice: less of it leaves slow
peers without a row."""


@dataclass(frozen=True)
class Plan:
    """The measurements, and the layers that they are made on."""

    square: tuple[Layer, ...]
    others: tuple[Layer, ...]
    repeats: int
    resnet: dict[str, int]
    growth: dict[str, dict[str, list[int]]]
    fresh: bool


SIZES, CHANNELS = "16 channels, N grows", "N = 16, channels grow"
"""Names of the two series of layers that grow."""
FULL = Plan(
    layers.SQUARE,
    layers.STRIDED + layers.SMOOTH,
    repeats=3,
    resnet={"width": 64, "size": 224},
    growth={
        SIZES: {"channels": [16], "sizes": [16, 24, 32, 48, 64]},
        CHANNELS: {"channels": [16, 32, 64, 128], "sizes": [16]},
        f"dense SVD: {SIZES}": {"channels": [16], "sizes": [6, 8, 10, 12]},
        f"dense SVD: {CHANNELS}": {"channels": [2, 4, 6, 8], "sizes": [16]},
    },
    fresh=True,
)
"""The plan of the published figures."""
QUICK = Plan(
    layers.SMALL_SQUARE,
    layers.SMALL_STRIDED,
    repeats=1,
    resnet={"width": 2, "size": 32},
    growth={
        "2 channels, N grows": {"channels": [2], "sizes": [6, 8, 10]},
        "dense SVD: 2 channels, N grows": {"channels": [2], "sizes": [6, 8, 10]},
    },
    fresh=False,
)
"""The plan of the tests: every branch, in seconds."""


class Run:
    """One run of a plan, which collects rows."""

    def __init__(self, plan: Plan, seconds: float, threads: int, seed: int, out: Path) -> None:
        self.plan, self.seconds, self.threads = plan, seconds, threads
        self.seed, self.out = seed, out
        self.rows: list[Row] = []
        self.growth: dict[str, dict[str, Any]] = {}

    def ours(self, function: str, **arguments: Any) -> dict[str, Any]:
        """A function of `benchmarks.ours`, with patience."""
        return call(
            f"benchmarks.ours:{function}",
            {"seed": self.seed, **arguments},
            seconds=PATIENCE * self.seconds,
            threads=self.threads,
            fresh=self.plan.fresh,
        )

    def peer(self, layer: Layer, name: str) -> dict[str, Any]:
        """The answer of a peer for a layer, within the time limit."""
        return call(
            "benchmarks.peers:run",
            {"layer": layer.name, "peer": name, "seed": self.seed},
            seconds=self.seconds,
            threads=self.threads,
            fresh=self.plan.fresh,
        )

    def everything(self, console: Console) -> None:
        """Measure the whole plan."""
        steps = [(layer.name, self.one_layer, layer) for layer in self.plan.square]
        steps += [(layer.name, self.one_layer, layer) for layer in self.plan.others]
        first = self.plan.square[0]
        steps.append((f"{first.name}, ten and ten", self.ten_and_ten, first))
        with console.status("") as status:
            for name, step, layer in steps:
                status.update(name)
                step(layer)
            status.update("ResNet-50")
            self.resnet()
            status.update("growth")
            self.grow()
        if not self.plan.fresh:  # the targets are for the layers of the full plan
            self.rows = [replace(row, target="", reached=None) for row in self.rows]

    def one_layer(self, layer: Layer) -> None:
        """Both ends of the spectrum of one layer, ours and the peers'."""
        answers = {name: self.peer(layer, name) for name in PEERS}
        order = border_order(layer) if layer in self.plan.square else None
        repeats = self.plan.repeats
        best = self.ours("smallest", layer=layer.name, repeats=repeats, lu_order=order)
        once = self.ours("smallest", layer=layer.name)
        if order is None:
            ratio, target, reached = self._against_primme(best, answers["PRIMME SM"])
            if layer.smooth:  # nothing was set for these, and PRIMME has no answer
                ratio, target, reached = "", "", None
        else:
            ratio, target, reached = self._against_lu(best, order)
        self.rows.append(_row(layer, "sigma_min", best, ratio, target, reached, once))
        self._add_peers(layer, answers, {"sigma_min": best})
        largest = self.ours("largest", layer=layer.name, repeats=repeats)
        ratio, reached = "", None
        if "value" in largest:
            factor = largest["seconds"] / largest["plain_seconds"]
            ratio = f"{factor:.2g} x 200 float32 Lanczos steps"
            reached = largest["converged"] and largest["applications"] <= 90 and factor <= 1
        target = "at most 45 applications each of M and M', no slower than those steps"
        if layer not in self.plan.square:  # nor for these
            target, reached = "", None
        self.rows.append(_row(layer, "sigma_max", largest, ratio, target, reached, largest))
        if "value" in largest:
            self.norm_bound(layer, largest["value"])
        self._add_peers(layer, answers, {"sigma_max": largest})

    def norm_bound(self, layer: Layer, norm: float) -> None:
        """The upper bound on sigma_max without iteration, beside sigma_max itself."""
        bound = self.ours("norm_bound", layer=layer.name, repeats=self.plan.repeats)
        what = "upper bound on sigma_max"
        if "failure" in bound:
            self.rows.append(Row(layer.name, what, note=bound["failure"]))
            return
        gap = bound["value"] / norm - 1
        first = layer is self.plan.square[0]
        self.rows.append(
            Row(
                layer.name, what, value=bound["value"], error=gap, seconds=bound["seconds"],
                peak_bytes=bound["peak_bytes"], target="within 0.1%" if first else "",
                reached=gap < 1e-3 if first else None, note="norm_bound",
            )
        )  # fmt: skip

    def _against_lu(self, best: dict[str, Any], order: int) -> tuple[str, str, bool | None]:
        target = f"at most 2.5 LU of order {order}"
        if "value" not in best:
            return "", target, None
        ratio = best["seconds"] / best["lu_seconds"]
        text = f"{ratio:.2f} LU of {best['lu_seconds']:.2f} s"
        return text, target, best["converged"] and ratio <= 2.5

    def _against_primme(
        self, best: dict[str, Any], primme: dict[str, Any]
    ) -> tuple[str, str, bool | None]:
        target = "at least 2 x faster than PRIMME"
        late = str(primme.get("failure", "")).startswith("not done")
        if "value" not in best or ("seconds" not in primme and not late):
            return "", target, None
        ratio = (self.seconds if late else primme["seconds"]) / best["seconds"]
        text = f"{'over ' if late else ''}{ratio:.2g} x faster than PRIMME"
        reached = best["converged"] and ratio >= 2
        return text, target, reached if reached or not late else None

    def _add_peers(
        self, layer: Layer, answers: dict[str, Any], ours: dict[str, dict[str, Any]]
    ) -> None:
        """A row for each peer that answers one of these quantities, or failed to."""
        for name, answer in answers.items():
            for what in (PEERS | PEERS_OF_TEN)[name].quantities:
                if what in ours:
                    self.rows.append(_peer_row(layer, what, name, answer, ours[what]))

    def ten_and_ten(self, layer: Layer) -> None:
        """The ends of the spectrum with vectors."""
        answers = {name: self.peer(layer, name) for name in PEERS_OF_TEN}
        mine = self.ours("ten_and_ten", layer=layer.name, repeats=self.plan.repeats)
        target, what = "under 3 s", "10 largest and 10 smallest, with vectors, tol 1e-6"
        if "failure" in mine:
            self.rows.append(Row(layer.name, what, target=target, note=mine["failure"]))
            return
        reached = mine["converged"] and mine["seconds"] < 3
        row = Row(
            layer.name, what, seconds=mine["seconds"], applications=mine["applications"],
            peak_bytes=mine["peak_bytes"], target=target, reached=reached, note=_method(mine),
        )  # fmt: skip
        self.rows.append(row)
        ours = {name: {"values": values} for name, values in mine["values"].items()}
        self._add_peers(layer, answers, ours)

    def resnet(self) -> None:
        """All convolutions of a ResNet-50, in one process."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = (self.out / "resnet50.csv").resolve()
        answer = self.ours("resnet", path=str(path), **self.plan.resnet)
        with path.open(newline="", encoding="utf-8") as file:
            found = list(csv.DictReader(file))
        count = len(layers.resnet50())
        name = f"ResNet-50, {count} convolutions"
        for which, what in (("LM", "sigma_max"), ("SM", "sigma_min")):
            mine = [row for row in found if row["which"] == which]
            sure = [row for row in mine if row["certified"] == "True"]
            good = [row for row in sure if row["converged"] == "True"]
            widths = [_width(row) for row in mine]
            note = f"{len(good)} of {count} converged and certified, {len(sure)} certified"
            note += f"; widest enclosure {max(widths, default=math.inf):.1e}"
            self.rows.append(
                Row(name, what, seconds=sum(float(row["seconds"]) for row in mine),
                    target="all certified", reached=len(good) == count, note=note)
            )  # fmt: skip
        limit = "under 90 s and 6 GiB, in one process"
        if "failure" in answer:
            done = len(found) // 2
            note = f"{answer['failure']}: {done} layers done"
            self.rows.append(Row(name, "all", target=limit, reached=False, note=note))
            return
        peak = answer["peak_bytes"]
        reached = answer["seconds"] < 90 and peak < 6 * 2**30
        self.rows.append(
            Row(name, "all", seconds=answer["seconds"], peak_bytes=peak, target=limit,
                reached=reached)
        )  # fmt: skip

    def grow(self) -> None:
        """Times of sigma_min as layers grow."""
        for name, points in self.plan.growth.items():
            dense = name.startswith("dense")
            answer = self.ours("growth", dense=dense, **points)
            who = "dense SVD" if dense else OURS
            what, layer = "time of sigma_min", name.removeprefix("dense SVD: ")
            if "failure" in answer:
                self.rows.append(Row(layer, what, who, note=answer["failure"]))
                continue
            self.growth[name] = {**answer, "seconds": answer["times"]}
            points_of_time = zip(answer["sizes"], answer["times"], strict=True)
            note = ", ".join(f"{size}: {time:.3g} s" for size, time in points_of_time)
            text = f"exponent {answer['exponent']:.2f}"
            self.rows.append(Row(layer, what, who, ratio=text, note=note))


def _row(
    layer: Layer,
    what: str,
    answer: dict[str, Any],
    ratio: str,
    target: str,
    reached: bool | None,
    memory: dict[str, Any],
) -> Row:
    if "failure" in answer:
        return Row(layer.name, what, target=target, reached=reached, note=answer["failure"])
    return Row(
        layer.name,
        what,
        value=answer["value"],
        lower=answer["lower"],
        upper=answer["upper"],
        seconds=answer["seconds"],
        ratio=ratio,
        applications=answer["applications"],
        peak_bytes=memory.get("peak_bytes"),
        target=target,
        reached=reached,
        note=_method(answer),
    )


def _peer_row(
    layer: Layer, what: str, name: str, answer: dict[str, Any], ours: dict[str, Any]
) -> Row:
    if "failure" in answer:
        return Row(layer.name, what, name, note=answer["failure"])
    values, truth = answer["values"][what], ours.get("values", [ours.get("value")])
    pairs = [(x, t) for x, t in zip(values, truth, strict=False) if t is not None]
    # A peer's value over a zero of ours is off by infinitely much.
    errors = [abs(x - t) / t if t > 0 else (math.inf if x > 0 else 0.0) for x, t in pairs]
    return Row(
        layer.name,
        what,
        name,
        value=values[-1],
        error=max(errors, default=None),
        seconds=answer["seconds"],
        applications=answer["applications"] or None,
        peak_bytes=answer["peak_bytes"],
        note=answer["note"],
    )


def _method(answer: dict[str, Any]) -> str:
    return answer["method"] + ("" if answer["converged"] else ", NOT CONVERGED")


def _width(row: dict[str, str]) -> float:
    """Width of an enclosure relative to the value."""
    if not row["upper"]:
        return math.inf
    value, width = float(row["value"]), float(row["upper"]) - float(row["lower"])
    return width / value if value > 0 and width > 0 else width


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small layers, in this process")
    parser.add_argument("--seconds", type=float, default=60.0, help="a peer's time limit")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    args = parser.parse_args(argv)
    console = Console()
    run = Run(QUICK if args.quick else FULL, args.seconds, args.threads, args.seed, args.out)
    run.everything(console)
    arguments = sys.argv[1:] if argv is None else argv
    facts = {
        "command": " ".join(["python -m benchmarks.spectra", *arguments]),
        "machine": machine(),
        "threads": args.threads,
        "time limit of a peer": f"{args.seconds:g} s",
        "weights": f"random, float64, seed {args.seed}",
    }
    report.print_rows(run.rows, console)
    files = report.write_report(args.out / "spectra", "Singular values", facts, run.rows)
    files.append(report.plot(args.out / "spectra.svg", run.rows, run.growth))
    console.print("wrote", ", ".join(map(str, files)))
    return run.rows


if __name__ == "__main__":
    main()
