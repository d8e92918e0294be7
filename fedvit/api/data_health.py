"""Models of data quality and data drift."""

from __future__ import annotations

from collections.abc import Mapping

from fedvit.api.base import View


class ClientQualityView(View):
    """One client; ``score`` is null where nothing is known of it, ``reasons`` say what lowers it."""

    client_id: str
    score: float | None
    validated: bool
    reasons: tuple[str, ...]
    rounds: int
    failures: int


class QualityView(View):
    """The active clients, those with the lowest scores first; a client below ``threshold`` is worth a look."""

    score: float | None
    threshold: float
    assessed: int
    unvalidated: tuple[str, ...]
    clients: tuple[ClientQualityView, ...]


class SignalView(View):
    """One signal; ``score`` is null while it cannot tell."""

    name: str
    value: float | None
    reference: float | None
    score: float | None
    reason: str


class FeatureView(View):
    """One histogram of the whole fleet against its reference: distances with the noise in them, js in bits, wasserstein
    in bins. ``statistic`` is chi-squared while nothing moves, and above ``threshold`` once in very many windows."""

    feature: str
    psi: float
    js: float
    ks: float
    wasserstein: float
    statistic: float
    threshold: float
    drifts: bool


class ClusterView(View):
    """Clients with alike label mixes that have moved together."""

    feature: str
    client_ids: tuple[str, ...]
    psi: float


class DriftView(View):
    """The highest score of all signals counts.

    ``compared`` clients have sent a histogram before the release and another since; those of ``drifting_clients`` have
    moved, feature by feature, and so have clusters of clients as a whole.
    """

    drifting: bool
    score: float | None
    threshold: float
    reference_version: str | None
    signals: tuple[SignalView, ...]
    compared: int
    features: tuple[FeatureView, ...]
    drifting_clients: Mapping[str, tuple[str, ...]]
    drifting_clusters: tuple[ClusterView, ...]
