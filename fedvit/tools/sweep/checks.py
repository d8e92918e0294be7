"""Checks of all trials of a sweep before the first one begins."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

from fedvit.aggregation.registry import check_mode, rule_for
from fedvit.config import Settings
from fedvit.data.partition import VirtualFleet
from fedvit.rounds.secure_sums import check_masks
from fedvit.tools.sweep.space import TrialPlan


def check_rules(plans: Sequence[TrialPlan]) -> None:
    """Load the aggregation rule of every trial and check that it goes with the trial's settings.

    Raises:
        ConfigError: a rule is unknown, cannot be loaded, has bad options, or does not go with the privacy unit or the
            place of the noise; or the masks of secure aggregation are not left out.
        ConflictError: it does not go with the mode of the rounds.
    """
    for settings in _distinct(
        [plan.settings for plan in plans],
        lambda one: (repr(one.training), one.privacy.privacy_unit, one.privacy.noise_place, one.simulation.mode),
    ):
        check_mode(rule_for(settings), settings.simulation.mode, settings)
    for settings in _distinct(
        [plan.settings for plan in plans], lambda one: (one.privacy.noise_place, one.secure_aggregation.masks)
    ):
        check_masks(settings, simulated=True)


def check_trials(plans: Sequence[TrialPlan]) -> None:
    """Check the rules, partition the data and build the model of every trial.

    Raises:
        ConfigError, ConflictError: see :func:`check_rules`.
        DataError: the data cannot be read, or not be partitioned as a trial demands.
        ModelError: a model cannot be built.
    """
    check_rules(plans)
    settings = [plan.settings for plan in plans]
    for one in _distinct(settings, lambda one: repr(one.data)):
        classes = VirtualFleet.open(one.data).source.classes
    # torch and timm are imported here, after everything that can be said without them.
    from fedvit.models.build import build_model

    for one in _distinct(settings, lambda one: repr(one.model)):
        build_model(one.model, len(classes), one.data.image_size)


def _distinct(settings: Sequence[Settings], key: Callable[[Settings], Hashable]) -> Iterator[Settings]:
    """The first settings of each key."""
    yield from {key(one): one for one in reversed(settings)}.values()
