"""Whole networks: Jacobians, gradient flow, Lipschitz bounds."""

from convspectra.network._jacobian import JacobianOperator

__all__ = ["JacobianOperator"]
