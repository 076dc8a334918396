"""Whole networks: Jacobians, gradient flow, Lipschitz bounds."""

from convspectra.network._flow_monitor import GradientFlowMonitor
from convspectra.network._flow_report import FlowLayer, GradientFlow
from convspectra.network._gradient_flow import gradient_flow
from convspectra.network._jacobian import JacobianOperator
from convspectra.network._lipschitz import LipschitzBound, LipschitzLayer, lipschitz_bound
from convspectra.network._step_size import LEARNING_RATE_BUDGET, suggested_rate

__all__ = [
    "LEARNING_RATE_BUDGET",
    "FlowLayer",
    "GradientFlow",
    "GradientFlowMonitor",
    "JacobianOperator",
    "LipschitzBound",
    "LipschitzLayer",
    "gradient_flow",
    "lipschitz_bound",
    "suggested_rate",
]
