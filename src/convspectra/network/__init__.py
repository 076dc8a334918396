"""Whole networks: Jacobians, gradient flow, Lipschitz bounds."""

from convspectra.network._jacobian import JacobianOperator
from convspectra.network._lipschitz import LipschitzBound, LipschitzLayer, lipschitz_bound

__all__ = ["JacobianOperator", "LipschitzBound", "LipschitzLayer", "lipschitz_bound"]
