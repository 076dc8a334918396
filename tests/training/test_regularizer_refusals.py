"""What SpectralRegularizer refuses, and which layer its errors name."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.regularized import Net, X, stack
from helpers.training import seeded
from torch import Tensor

import convspectra as cs
from convspectra import ConvOperator, SpectralRegularizer, penalties
from convspectra.penalties import _extremes as extremes

BAD_OPTIONS = [
    (
        {"penalty": "spectral"},
        r"one of \('frobenius', 'sigma_min', .*'isometry'\) or a function",
    ),
    ({"penalty": None}, "penalty to be a name or a function, got NoneType"),
    ({"penalty": 3}, "penalty to be a name or a function, got int"),
    ({"weight": -1.0}, r"finite and at least 0, got -1\.0"),
    ({"weight": math.inf}, "finite and at least 0, got inf"),
    ({"weight": math.nan}, "finite and at least 0, got nan"),
    ({"weight": "1"}, "weight to be a number, got '1'"),
    ({"weight": True}, "weight to be a number, got True"),
    ({"include": lambda *_: False}, "expected layers to include in Net, got none"),
    ({"include": 3}, "expected a selection of layers to be a name pattern.*got 3"),
    ({"include": [3]}, "expected a selection of layers to be a name pattern"),
    ({"exclude": "*"}, "expected layers to include in Net, got none"),
    ({"penalty_options": {"k": 2}}, "penalty_options of 'stein': expected gain alone, got ..k.."),
    ({"penalty": "band", "penalty_options": {"n": 2}}, "penalty_options of 'band': .*'n'"),
    ({"penalty": "band", "penalty_options": {"lower": 9}}, "0 <= lower <= upper, got lower=9"),
    ({"penalty": "sigma_min", "penalty_options": {"k": 0}}, "k to be a positive integer, got 0"),
    ({"penalty": "sigma_min", "penalty_options": {"k": 37}}, "'stem': expected k in 1 to 36"),
    ({"refresh_interval": 0}, "refresh_interval to be a positive integer, got 0"),
    ({"improve_interval": 1.5}, r"improve_interval to be a positive integer, got 1\.5"),
    ({"nonfinite": "ignore"}, "nonfinite to be 'raise' or 'skip', got 'ignore'"),
    ({"schedule": 3}, "schedule to be a function of the step, got 3"),
    ({"layer_weights": {"stem": 1.0, "nose": 2.0}}, r"got some for \['nose'\]"),
    ({"layer_weights": {"b": -1.0}}, r"weight of layer 'b' to be finite and at least 0, got -1\.0"),
    ({"process_group": "mine"}, "process_group to be 'default', None or a process group"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SpectralRegularizer(seeded(Net), X, **options)


def test_a_weight_that_turned_nan_is_named():
    model = seeded(Net)
    reg = SpectralRegularizer(model, X)
    with torch.no_grad():
        model.b.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^layer 'b': expected a finite weight.*at step 0"):
        reg()


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ValueError("of mine"), "^layer 'stem': of mine$"),
        (ArithmeticError("of mine"), "^layer 'stem': of mine$"),
        (RuntimeError("of mine"), "^layer 'stem': of mine$"),
        (ValueError(), "^layer 'stem'$"),
        (ValueError(3), "^layer 'stem': 3$"),
        (KeyError("of mine"), "^'of mine'$"),
    ],
)
def test_errors_of_a_penalty_reach_the_user_as_themselves_with_the_layer(raised, message):
    def fail(op: ConvOperator) -> Tensor:
        raise raised

    with pytest.raises(type(raised), match=message) as caught:
        SpectralRegularizer(seeded(Net), X, penalty=fail)()
    assert caught.value is raised


def test_a_singular_value_that_did_not_converge_is_named(monkeypatch):
    original = extremes.svds
    # Penalties have no option for the steps: too few of them are asked for here.
    monkeypatch.setattr(
        extremes,
        "svds",
        lambda op, k, which, **options: original(
            op, k, which, method="lobpcg", maxiter=1, **options
        ),
    )
    with pytest.raises(cs.ConvergenceError, match=r"^layer '0': the 1 smallest") as caught:
        SpectralRegularizer(
            stack(2), torch.zeros(1, 3, 6, 6).double(), penalty=penalties.sigma_min
        )()
    assert not caught.value.result.converged
