"""Learned solvers: the coefficients of a table are fitted, and the network stays as it is.

    targets       what a fit aims at: the teacher, which takes every cell of the student's grid in many pieces
    closed_form   dode, one number a row, and rows, all the numbers of a row: least squares, no gradients
    end_to_end    coefficients and times together, by gradients through the whole table; needs torch
    bundles       fitting to a bundle: its network, its levels, guidance, and what the table says of itself

All three make a `Tableau` like any other, so a learned solver is served, swapped and hashed as a table.
"""

from .bundles import Settings, fit_bundle, levels_of, network_of
from .closed_form import Direction, fit_rows
from .fit import METHODS, Fit, Method, fit
from .targets import FitError, Network, Samples, Target, Teacher, follow

__all__ = [
    "METHODS",
    "Direction",
    "Fit",
    "FitError",
    "Method",
    "Network",
    "Samples",
    "Settings",
    "Target",
    "Teacher",
    "fit",
    "fit_bundle",
    "fit_rows",
    "follow",
    "levels_of",
    "network_of",
]
