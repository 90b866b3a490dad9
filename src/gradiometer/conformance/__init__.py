"""Closed-form truths for estimators of the noise scale and of the fluctuation-dissipation relation.

``gradiometer verify`` runs them against this package's own estimators in a real training loop. To check
another one, write an adapter, a function from the steps of a run to the quantities it measures:

    >>> from gradiometer.conformance import check, noise_cases
    >>> def mine(steps):
    ...     both = [two_estimates(step.gradients / step.loss_scale, step.sizes) for step in steps]
    ...     ...
    >>> print(check(mine, noise_cases()).table())                                # doctest: +SKIP

or from a shell ``gradiometer verify --adapter package.module:mine --kind noise``. ``reference.py`` is an
adapter for both kinds of case; :func:`check` says what it may return.
"""

from __future__ import annotations

from .noise_cases import noise_cases as noise_cases
from .reference import reference as reference
from .relation_cases import relation_cases as relation_cases
from .steps import NoiseStep as NoiseStep
from .steps import RelationStep as RelationStep
from .suite import Case as Case
from .suite import Check as Check
from .suite import Report as Report
from .suite import check as check
