"""Kernels before and during training: the regularizer, preconditioning, projections, descent."""

from convspectra.training._descent import ALGORITHMS, PAPER_STEPS, DescentResult, descend
from convspectra.training._preconditioning import PreconditionedLayer, precondition
from convspectra.training._preparation import PreparationReport, PreparedLayer, prepare
from convspectra.training._projection import Projection, project, project_
from convspectra.training._regularizer import SpectralRegularizer
from convspectra.training._report import LayerReport, RegularizerReport
from convspectra.training._schedule import Schedule

__all__ = [
    "ALGORITHMS",
    "PAPER_STEPS",
    "DescentResult",
    "LayerReport",
    "PreconditionedLayer",
    "PreparationReport",
    "PreparedLayer",
    "Projection",
    "RegularizerReport",
    "Schedule",
    "SpectralRegularizer",
    "descend",
    "precondition",
    "prepare",
    "project",
    "project_",
]
