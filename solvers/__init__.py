"""Solvers of the ODE and the SDE."""

from solvers import steps
from solvers.steps import *  # noqa: F403

globals().update({k: v for k, v in vars(steps).items() if not k.startswith('__')})
