"""The cost of a penalty in a training step, and its effect: ours, and what people use instead.

``python -m benchmarks.training --data FOLDER`` trains a ResNet-18 on 32 x 32 images, batch 128, all
its 3 x 3 layers preconditioned first (once, kept in --cache), by every arm from that same start.
The arms of a group take turns, a step each, in a new random order every time, so that all see the
same machine. It compares the singular values that are followed with exact ones along the run of
``conditioning``, and at the end the warm penalty of one layer with that layer's own forward and
backward pass.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import convspectra as cs
from benchmarks.resnet18 import is_three_by_three, resnet18
from common import peers
from common.images import load
from common.measure import machine, timed
from common.networks import as_applied
from convspectra.models._layers import find_layers
from convspectra.training import _followed_values as reference

SIZE = 32
"""Pixels a side: those of CIFAR."""
RATE = 0.01
"""Learning rate of every arm. A choice: the arms are compared with each other only."""
WEIGHT = 1e-2
"""Weight of the penalties in the loss. A choice, the same for all of ours."""
EVERY = 4
"""Steps from one to the next with the penalty, where it comes now and then."""
PEER_WEIGHT = 1e-2
"""Weight of the peers' penalties. A choice, as that of ours."""
PROJECTION_INTERVAL = 100
"""Steps between projections of the circular layer, which cost an SVD a pixel. A choice, told on
the page."""
GROUPS = ("conditioning", "frobenius", "peers")
"""Arms that take turns with each other."""
ERRORS = ("sigma_max", "sigma_min", "sigma_max read", "sigma_min read")
"""Columns of what the followed values are off by."""
MOST_ROWS = 40
"""Checks that the page shows, evenly over the run; all of them are in the JSON file."""

Penalty = Callable[[], Tensor]
"""A function without arguments that gives the penalty."""


@dataclass
class Arm:
    """A network in training."""

    name: str
    network: nn.Sequential
    penalty: Penalty | None = None
    weight_decay: float = 0.0
    after: Callable[[int], object] = lambda step: None
    seconds: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    setup: float = 0.0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=RATE, momentum=0.9, weight_decay=self.weight_decay
        )

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One step of SGD on the loss and the penalty."""
        self.optimizer.zero_grad()
        loss = cross_entropy(self.network(images), labels)
        alone = 0.0
        if self.penalty is not None:
            alone, penalty = timed(self.penalty)
            loss = loss + penalty
        loss.backward()
        self.optimizer.step()
        alone += timed(partial(self.after, len(self.seconds)))[0]
        self.alone.append(alone)


def three_by_threes(network: nn.Module) -> list[nn.Conv2d]:
    return [m for name, m in network.named_modules() if is_three_by_three(name, m)]  # type: ignore[misc]


def regularizer(
    network: nn.Module, example: Tensor, name: str, every: int = 1
) -> cs.SpectralRegularizer:
    return cs.SpectralRegularizer(
        network,
        example,
        penalty=name,
        weight=WEIGHT,
        include=is_three_by_three,
        schedule=cs.Schedule(every=every),
    )


def with_conditioning(
    start: nn.Sequential, example: Tensor
) -> tuple[list[Arm], cs.SpectralRegularizer]:
    network = copy.deepcopy(start)
    reg = regularizer(network, example, "conditioning")
    arm = Arm("conditioning", network, reg)
    arm.setup = timed(reg)[0]
    return [plain(start), arm], reg


def plain(start: nn.Sequential) -> Arm:
    return Arm("plain", copy.deepcopy(start))


def with_frobenius(start: nn.Sequential, example: Tensor) -> list[Arm]:
    """In the loss, apart from it, and what people have in its place."""

    def in_the_loss(every: int) -> Arm:
        network = copy.deepcopy(start)
        name = "frobenius" if every == 1 else f"frobenius, every {every} steps"
        return Arm(name, network, regularizer(network, example, "frobenius", every))

    decoupled = copy.deepcopy(start)
    reg = regularizer(decoupled, example, "frobenius")
    return [
        plain(start),
        in_the_loss(1),
        in_the_loss(EVERY),
        Arm("frobenius, decoupled", decoupled, after=lambda step: reg.step(RATE)),
        Arm("weight decay", copy.deepcopy(start), weight_decay=5e-4),
    ]


def peers_of(start: nn.Sequential, example: Tensor) -> list[Arm]:
    def with_penalty(name: str, penalty: Callable[[nn.Conv2d], Tensor]) -> Arm:
        network = copy.deepcopy(start)
        layers = three_by_threes(network)
        return Arm(
            name,
            network,
            lambda: PEER_WEIGHT * torch.stack([penalty(layer) for layer in layers]).sum(),
        )

    normalized = copy.deepcopy(start)
    for layer in three_by_threes(normalized):
        nn.utils.parametrizations.spectral_norm(layer)
    held = copy.deepcopy(start)
    for found in find_layers(held, example, is_three_by_three):
        cs.parametrizations.spectral_norm(found.module, found.input_size)
    projected = copy.deepcopy(start)
    sizes = find_layers(projected, example, is_three_by_three)

    def project(step: int) -> None:
        if step % PROJECTION_INTERVAL == 0:
            for layer in sizes:
                if layer.module.stride == (1, 1):
                    with torch.no_grad():
                        layer.module.weight.copy_(
                            peers.project_circular(layer.module.weight, layer.input_size)
                        )

    return [
        plain(start),
        with_penalty("soft orthogonality", lambda m: peers.soft_orthogonality(m.weight)),
        with_penalty("SRIP", lambda m: peers.srip(m.weight)),
        with_penalty("OCNN", lambda m: peers.convolutional_orthogonality(m.weight, m.stride[0])),
        Arm("spectral_norm", normalized),
        Arm("parametrizations.spectral_norm", held),
        Arm("circular projection", projected, after=project),
    ]


def exact(network: nn.Module, example: Tensor) -> list[tuple[float, float]]:
    """sigma_max and sigma_min of every layer, as `svds` has them."""
    found = []
    for layer in find_layers(as_applied(network), example.double(), is_three_by_three):
        op = layer.operator()
        largest, smallest = (
            cs.svds(op, 1, which, return_singular_vectors=False, tol=1e-5) for which in ("LM", "SM")
        )
        found.append((float(largest.s[0]), float(smallest.s[0])))
    return found


def errors(reg: cs.SpectralRegularizer, network: nn.Module, example: Tensor) -> dict[str, float]:
    """Worst relative errors of the values that are followed, over the layers."""
    truth = exact(network, example)
    pairs = list(zip(reg.report().layers, truth, strict=True))
    read = list(zip(reg.report(settle=False).layers, truth, strict=True))
    return {
        "sigma_max": max(abs(one.sigma_max / s - 1) for one, (s, _) in pairs),
        "sigma_min": max(abs(one.sigma_min / s - 1) for one, (_, s) in pairs),
        "sigma_max read": max(abs(one.sigma_max / s - 1) for one, (s, _) in read),
        "sigma_min read": max(abs(one.sigma_min / s - 1) for one, (_, s) in read),
        "outside": sum(
            not (
                one.sigma_max_lower * (1 - 1e-4) <= largest <= one.sigma_max_upper * (1 + 1e-4)
                and one.sigma_min_lower * (1 - 1e-4) <= smallest <= one.sigma_min_upper * (1 + 1e-4)
            )
            for one, (largest, smallest) in pairs
        ),
        "least sigma_min": min(smallest for _, (_, smallest) in pairs),
        "largest sigma_max": max(largest for _, (largest, _) in pairs),
    }


def one_layer(repeats: int = 20) -> dict[str, float]:
    """Milliseconds: a 64 -> 64 layer at 32 x 32, and its warm penalty of both ends."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    images = torch.randn(32, 64, SIZE, SIZE, requires_grad=True)
    reg = cs.SpectralRegularizer(conv, images[:1].detach(), penalty="cond")
    reference.LONGEST = 1  # an improvement at every call
    reg()

    def layer() -> None:
        conv(images).square().sum().backward()

    def penalty() -> None:
        with torch.no_grad():
            conv.weight.mul_(1.0001)
        reg().backward()

    layer(), penalty()
    times = {"layer": [], "penalty": []}
    for _ in range(repeats):
        for name, function in (("layer", layer), ("penalty", penalty)):
            times[name].append(1e3 * timed(function)[0])
    return {name: statistics.median(values) for name, values in times.items()}


def preconditioned(example: Tensor, cache: Path) -> nn.Sequential:
    network = resnet18()
    if cache.is_file():
        network.load_state_dict(torch.load(cache))
        return network
    seconds, _ = timed(partial(cs.precondition, network, example, include=is_three_by_three))
    Console(stderr=True).print(f"preconditioned in {seconds:.0f} s")
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), cache)
    return network


def run(
    arms: list[Arm],
    steps: int,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    look: Callable[[int], None] = lambda step: None,
) -> None:
    """All arms to `steps`; `look` is called after every step, outside the time."""
    order = random.Random(0)
    for step in range(steps):
        images, labels = batch(step)
        for arm in order.sample(arms, len(arms)):
            arm.seconds.append(timed(partial(arm.step, images, labels))[0])
        look(step + 1)


def row(arm: Arm, plain: Arm, example: Tensor) -> dict[str, Any]:
    """The times of an arm beside those of `plain` of its group, and where it ended."""
    values = exact(arm.network, example)
    mean = statistics.mean(plain.seconds)
    more = [one - other for one, other in zip(arm.seconds, plain.seconds, strict=True)]
    return {
        "arm": arm.name,
        "steps": len(arm.seconds),
        "seconds a step": statistics.mean(arm.seconds),
        "ratio": statistics.mean(arm.seconds) / mean,
        "standard error": statistics.stdev(more) / math.sqrt(len(more)) / mean,
        "median ratio": statistics.median(arm.seconds) / statistics.median(plain.seconds),
        "alone, ms": 1e3 * statistics.mean(arm.alone),
        "first call": arm.setup,
        "sigma_max": max(largest for largest, _ in values),
        "sigma_min": min(smallest for _, smallest in values),
    }


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    groups = [result["groups"][name] for name in GROUPS if name in result["groups"]]
    rows = [row for group in groups for row in group["rows"]]
    columns = [name for name in rows[0] if name != "arm"]
    commands = dict.fromkeys(group["command"] for group in groups)
    lines = [
        "# What a penalty costs in training",
        "",
        f"ResNet-18, images of {SIZE} x {SIZE} ({result['images']}), batch 128, SGD at 0.01 with "
        f"momentum, all 3 x 3 layers; start: {result['start']}. {result['machine']}.",
        f"Made by {' and '.join(f'`{command}`' for command in commands)}.",
        "",
        "Ratios are to `plain` of the same group, which takes turns with it; `ratio` is of the "
        "means, refreshes included, with its standard error from the differences of single steps; "
        "`first call` in seconds is not in it. `alone` is the part of a step that is spent in the "
        "penalty: all of it where it stands apart from the loss, without the backward pass where "
        "it is added. Singular values are the worst over the layers at the end, exact ones.",
        "",
        f"| arm | {' | '.join(columns)} |",
        "|" + "---|" * (len(columns) + 1),
    ]
    for row in rows:
        cells = (f"{row[column]:.4g}" for column in columns)
        lines.append(f"| {row['arm']} | {' | '.join(cells)} |")
    lines += [
        "",
        "Followed values against exact ones along the run of `conditioning`: worst relative errors "
        "over the layers of what `report()` gives and of what the penalty reads, which is the same "
        "before it has settled, and enclosures that missed the exact value.",
        "",
        *_worst(result["checks"]),
        "| after step | sigma_max | sigma_min | sigma_max, read | sigma_min, read | missed "
        "| least sigma_min | largest sigma_max |",
        "|" + "---|" * 8,
    ]
    checks = result["checks"]
    for check in checks[:: -max(1, len(checks) // MOST_ROWS)][::-1]:
        values = (f"{value:.2g}" for key, value in check.items() if key != "step")
        lines.append(f"| {check['step']} | {' | '.join(values)} |")
    one = result["one layer"]
    lines += [
        "",
        f"One 64 -> 64 layer at {SIZE} x {SIZE}: forward and backward pass at batch 32 "
        f"{one['layer']:.3g} ms; its warm penalty `cond`, value and gradient of both ends with a "
        f"step of tracking, {one['penalty']:.3g} ms.",
        "",
    ]
    return "\n".join(lines)


def _worst(checks: list[dict[str, float]]) -> list[str]:
    """A paragraph on all checks together."""
    if not checks:
        return []
    errors = ", ".join(f"{max(check[name] for check in checks):.2g}" for name in ERRORS)
    missed = sum(check["outside"] for check in checks)
    return [
        f"Worst over all {len(checks)} checks, in the order of the columns: {errors}; "
        f"{missed} missed. Some of them:",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200, help="with conditioning")
    parser.add_argument("--frobenius-steps", type=int, default=100, help="with frobenius")
    parser.add_argument("--peer-steps", type=int, default=20, help="with what others use")
    parser.add_argument("--check", type=int, default=20, help="steps between exact computations")
    parser.add_argument(
        "--groups",
        nargs="+",
        choices=GROUPS,
        default=list(GROUPS),
        help="of arms that take turns; the others stay as they are in the folder",
    )
    parser.add_argument("--from-scratch", action="store_true", help="do not precondition")
    parser.add_argument("--cache", type=Path, default=Path("out/resnet18.pt"))
    parser.add_argument("--out", type=Path, help="folder of training.json and .md")
    options = parser.parse_args()
    images = load(options.data, train_images=10_000, test_images=10)
    example = torch.zeros(1, 3, SIZE, SIZE)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(
            len(images.train_images), (128,), generator=torch.Generator().manual_seed(step)
        )
        x = interpolate(images.train_images[chosen], size=SIZE)
        return x.expand(-1, 3, -1, -1), images.train_labels[chosen]

    start = resnet18() if options.from_scratch else preconditioned(example, options.cache)
    console = Console()
    name = "training_from_scratch" if options.from_scratch else "training"
    file = None if options.out is None else options.out / f"{name}.json"
    result: dict[str, Any] = {"groups": {}, "checks": []}
    if file is not None and file.is_file():
        result = json.loads(file.read_text())
    result |= {
        "machine": machine(),
        "images": images.name,
        "start": "default initialization" if options.from_scratch else "preconditioned",
    }
    command = " ".join(["python -m benchmarks.training", *sys.argv[1:]])

    def keep(group: str, arms: list[Arm]) -> None:
        rows = [row(arm, arms[0], example) for arm in arms]
        console.print(rows)
        result["groups"][group] = {"command": command, "rows": rows}

    if "conditioning" in options.groups:
        arms, reg = with_conditioning(start, example)
        result["checks"] = []

        def look(step: int) -> None:
            if step % options.check == 0:
                result["checks"].append({"step": step, **errors(reg, arms[1].network, example)})
                console.print(result["checks"][-1])

        run(arms, options.steps, batch, look)
        keep("conditioning", arms)
    if "frobenius" in options.groups:
        frobenius = with_frobenius(start, example)
        run(frobenius, options.frobenius_steps, batch)
        keep("frobenius", frobenius)
    if "peers" in options.groups:
        peers = peers_of(start, example)
        run(peers, options.peer_steps, batch)
        keep("peers", peers)
    result["one layer"] = one_layer()
    console.print(result["one layer"])
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
        file.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
