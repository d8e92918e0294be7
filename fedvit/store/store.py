"""The one door to a state folder: fleet, runs, rounds, versions, releases, privacy ledger and who may ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from fedvit.api.incidents import RemediationOutcome
from fedvit.errors import ConflictError, StateError
from fedvit.ports import Charge, LedgerEntry
from fedvit.store import audit as _audit
from fedvit.store import budget as _budget
from fedvit.store import fleet as _fleet
from fedvit.store import histograms as _sketches
from fedvit.store import idempotency as _idempotency
from fedvit.store import incidents as _incidents
from fedvit.store import ledger as _ledger
from fedvit.store import operations as _operations
from fedvit.store import remediations as _remediations
from fedvit.store import runs as _runs
from fedvit.store import timeline as _timeline
from fedvit.store import tokens as _tokens
from fedvit.store import versions as _versions
from fedvit.store.blobs import FileBlobStore
from fedvit.store.database import Database, open_database
from fedvit.store.records import (
    Alert,
    AuditEntry,
    AuditFacts,
    BudgetPeriod,
    BudgetRequest,
    ClientPage,
    Derivation,
    FleetInfo,
    Incident,
    IncidentEvent,
    LoggedAlert,
    Release,
    Remediation,
    RequestKey,
    RoundCommit,
    RoundTally,
    Standing,
    StoredAnswer,
    TimelineEvent,
    Token,
    Validation,
)
from fedvit.store.versions import Sign
from fedvit.types import (
    Client,
    Cohort,
    LastContact,
    LedgerFreeze,
    ModelVersion,
    Operation,
    OperationStatus,
    Participation,
    RoundRecord,
    Run,
    RunStatus,
    Severity,
    UpdateStatistics,
    utc_now,
)
from fedvit.wire.histograms import ClientHistogram, HistogramSpec

_OWN_KEYS = frozenset(
    {
        _fleet.FLEET_KEY,
        _ledger.FREEZE_KEY,
        _ledger.COPY_KEY,
        _budget.REQUESTS_KEY,
        _budget.CALL_KEY,
        _versions.RELEASE_FLOOR_KEY,
        *(chain.head_key for chain in (_ledger.CHAIN, _budget.CHAIN, _audit.CHAIN)),
    }
)

__all__ = [
    "Alert",
    "AuditEntry",
    "AuditFacts",
    "BudgetPeriod",
    "BudgetRequest",
    "ClientPage",
    "Derivation",
    "FleetInfo",
    "Incident",
    "IncidentEvent",
    "LedgerFreeze",
    "LoggedAlert",
    "Release",
    "Remediation",
    "RequestKey",
    "RoundCommit",
    "RoundTally",
    "Sign",
    "Standing",
    "Store",
    "StoredAnswer",
    "TimelineEvent",
    "Token",
    "Validation",
]


class Store:
    """A state folder, opened with :meth:`open`. Safe for threads and for several processes at once.

    Every method that writes is one transaction: it happened, durably, or it did not. Any method raises
    :class:`~fedvit.errors.StateError` when the file cannot be used (locked too long, disk full, damaged).

    Attributes:
        home: the state folder.
        blobs: its content-addressed bytes.
    """

    def __init__(self, home: Path, database: Database) -> None:
        self.home = home
        self.blobs = FileBlobStore(home / "blobs")
        self._database = database
        self._meta: tuple[int, dict[str, Any]] = (-1, {})

    @classmethod
    def open(cls, home: Path) -> Store:
        """Open the state folder ``home``, created where missing and migrated where old.

        Raises:
            StateError: ``home`` cannot be written, its database is damaged, or a newer fedvit wrote it; the database
                file is left byte-identical.
        """
        try:
            home.mkdir(parents=True, exist_ok=True)
            return cls(home, open_database(home))
        except OSError as error:
            raise StateError(
                f"The state folder {home} cannot be used: {error.strerror or error}.",
                cure="Name a folder that this user may write to with --home.",
            ) from error

    def close(self) -> None:
        """Close the database; harmless when done twice."""
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # --- fleet -------------------------------------------------------------------------------------------------------

    def bind_fleet(self, *, data_digest: str, partition: Mapping[str, Any], classes: Sequence[str]) -> None:
        """Record which data this state folder belongs to; harmless when it is the same again.

        Raises:
            StateError: it belongs to other data; the message names both digests.
        """
        with self._database.write() as session:
            _fleet.bind_fleet(session, FleetInfo(data_digest, dict(partition), tuple(classes)))

    def fleet(self) -> FleetInfo | None:
        """The fleet that the folder is bound to, or None."""
        with self._database.read() as session:
            return _fleet.fleet(session)

    def register_clients(self, clients: Iterable[Client]) -> int:
        """Insert new clients, refresh kind, records and capabilities of known ones; return how many are new.

        ``validated``, ``active`` and ``registered_at`` of a known client stay: an operator decides them.
        """
        with self._database.write() as session:
            return _fleet.register_clients(session, clients)

    def population(self) -> int:
        """How many clients are registered; each keeps a position below that, from 0."""
        with self._database.read() as session:
            return _fleet.population(session)

    def eligible_at(
        self, positions: Sequence[int], *, validated_only: bool = False, heard_since: datetime | None = None
    ) -> dict[int, str]:
        """Those of the clients at these positions that may be drawn, by position.

        They are active, have data, are not in quarantine, and are validated where that is asked for. One that is not
        virtual has a trainer and was heard since ``heard_since``: whoever cannot answer is neither drawn nor charged.
        """
        with self._database.read() as session:
            return _fleet.eligible_at(session, positions, validated_only, heard_since)

    def count_eligible(
        self, *, validated_only: bool = False, heard_since: datetime | None = None, at_most: int | None = None
    ) -> int:
        """How many clients may be drawn; no more than ``at_most`` are counted."""
        with self._database.read() as session:
            return _fleet.count_eligible(session, validated_only, heard_since, at_most)

    def count_units(self) -> tuple[int, int]:
        """How many active clients there are, and how many examples they have together."""
        with self._database.read() as session:
            return _fleet.count_units(session)

    def num_examples(self, client_ids: Sequence[str]) -> dict[str, int]:
        """How many examples these clients are registered with; unknown ones are left out."""
        with self._database.read() as session:
            return _fleet.num_examples(session, client_ids)

    def client(self, client_id: str) -> Client:
        """One client.

        Raises:
            NotFoundError: no such client.
        """
        with self._database.read() as session:
            return _fleet.client(session, client_id)

    def clients(
        self,
        *,
        active: bool | None = None,
        validated: bool | None = None,
        offset: int = 0,
        limit: int | None = None,
    ) -> list[Client]:
        """Clients ordered by id; None filters nothing."""
        with self._database.read() as session:
            return _fleet.clients(session, active, validated, offset, limit)

    def remote_clients(self, client_ids: Sequence[str]) -> list[Client]:
        """Those of these clients that are active and not virtual, ordered by id."""
        with self._database.read() as session:
            return _fleet.remote_clients(session, client_ids)

    def count_clients(
        self, *, active: bool | None = None, validated: bool | None = None, quarantined: bool | None = None
    ) -> int:
        """How many clients match; None filters nothing."""
        with self._database.read() as session:
            return _fleet.count_clients(session, active, validated, quarantined)

    def metrics_addresses(self) -> dict[str, str]:
        """Where active remote clients say that their metrics are, by client; nobody checked what they say."""
        with self._database.read() as session:
            return _fleet.metrics_addresses(session)

    def set_client(self, client_id: str, *, active: bool | None = None, validated: bool | None = None) -> Client:
        """Change what is not None.

        Raises:
            NotFoundError: no such client.
        """
        with self._database.write() as session:
            return _fleet.set_client(session, client_id, active, validated)

    def client_page(self, offset: int, limit: int) -> ClientPage:
        """Clients ordered by id, and the totals, as of one moment."""
        with self._database.read() as session:
            return _fleet.client_page(session, offset, limit)

    def last_contacts(self, *, hosted: bool = True) -> list[LastContact]:
        """The whereabouts of all active clients, ordered by id; of virtual ones only where ``hosted`` are asked for."""
        with self._database.read() as session:
            return _fleet.last_contacts(session, hosted)

    def count_hosted(self) -> int:
        """How many active clients are virtual."""
        with self._database.read() as session:
            return _fleet.count_hosted(session)

    def validate_client(self, client_id: str, verdict: Validation) -> Client:
        """Record whether an operator trusts a client's data, and why.

        Raises:
            NotFoundError: no such client.
        """
        with self._database.write() as session:
            return _fleet.validate_client(session, client_id, verdict)

    def validations(self, client_ids: Sequence[str]) -> dict[str, Validation]:
        """What operators last decided on these clients; nothing for those on whom nobody did."""
        with self._database.read() as session:
            return _fleet.validations(session, client_ids)

    def touch_clients(self, seen: Mapping[str, datetime]) -> None:
        """Move ``last_seen_at`` of these clients forward, never back; unknown ones are passed over."""
        with self._database.write() as session:
            _fleet.touch_clients(session, seen)

    def quarantine_clients(self, client_ids: Sequence[str], reason: str, at: datetime) -> list[str]:
        """Keep these clients out of every round; return those that are registered. The first quarantine stands."""
        with self._database.write() as session:
            return _fleet.quarantine_clients(session, client_ids, reason, at)

    def quarantined_clients(self) -> list[str]:
        """Ids of all clients in quarantine, sorted."""
        with self._database.read() as session:
            return _fleet.quarantined_clients(session)

    def reinstate_client(self, client_id: str) -> Client:
        """Lift a client's quarantine; harmless where there is none.

        Raises:
            NotFoundError: no such client.
        """
        with self._database.write() as session:
            return _fleet.reinstate_client(session, client_id)

    # --- runs and rounds ---------------------------------------------------------------------------------------------

    def create_run(
        self,
        *,
        rounds_total: int,
        noise_multiplier: float,
        config: Mapping[str, Any],
        config_digest: str,
        data_digest: str,
    ) -> Run:
        """Begin the next run, ``run-0001`` and so on. ``config`` holds JSON types only.

        Raises:
            ConflictError: another run can still be continued.
        """
        with self._database.write() as session:
            return _runs.create_run(
                session,
                rounds_total=rounds_total,
                noise_multiplier=noise_multiplier,
                config=config,
                config_digest=config_digest,
                data_digest=data_digest,
            )

    def run(self, run_id: str) -> Run:
        """One run.

        Raises:
            NotFoundError: no such run.
        """
        with self._database.read() as session:
            return _runs.run(session, run_id)

    def latest_run(self) -> Run | None:
        """The run begun last, or None."""
        with self._database.read() as session:
            return _runs.latest_run(session)

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        with self._database.read() as session:
            return _runs.runs(session)

    def set_run_status(self, run_id: str, status: RunStatus, reason: str | None = None) -> Run:
        """Move a run to ``status``; every status but RUNNING sets ``ended_at``, RUNNING clears it.

        Raises:
            NotFoundError: no such run.
            ConflictError: ``status`` is resumable, and another run is so already.
        """
        with self._database.write() as session:
            return _runs.set_run_status(session, run_id, status, reason)

    def open_round(self, run_id: str, round_index: int, cohort: Cohort) -> RoundRecord:
        """Record the cohort of the run's next round (1-based); a retry gets the recorded one back, whatever it drew.

        Raises:
            NotFoundError: no such run.
            ConflictError: ``round_index`` is not ``rounds_done + 1``, or the cohort was drawn for another round.
        """
        with self._database.write() as session:
            return _runs.open_round(session, run_id, round_index, cohort)

    def commit_round(self, run_id: str, round_index: int, commit: RoundCommit) -> ModelVersion:
        """Outcomes, results, the run's progress and the new version ``v1.<run ordinal>.<n>``, in one transaction.

        Raises:
            NotFoundError: the round was never opened.
            ConflictError: it is committed already, an outcome is a stranger's or a client's second one, or a client
                that contributed was quarantined meanwhile. A late outcome belongs to the cohort of the round that it
                started in.
        """
        with self._database.write() as session:
            return _runs.commit_round(session, run_id, round_index, commit)

    def rounds(self, run_id: str) -> list[RoundRecord]:
        """The rounds of a run in order, the open one included.

        Raises:
            NotFoundError: no such run.
        """
        with self._database.read() as session:
            return _runs.rounds(session, run_id)

    def round(self, run_id: str, round_index: int) -> RoundRecord:
        """One round.

        Raises:
            NotFoundError: no such round.
        """
        with self._database.read() as session:
            return _runs.round_record(session, run_id, round_index)

    def engagements(
        self, run_id: str, before: int, client_ids: Sequence[str] | None = None
    ) -> dict[str, tuple[int, int]]:
        """By client, in how many rounds of a run it was charged, and the last one that it was charged or folded in.

        Rounds from ``before`` on do not count. Asked of all clients, or of these.
        """
        with self._database.read() as session:
            return _runs.engagements(session, run_id, before, client_ids)

    def awaited(self, run_id: str, started: int, round_index: int) -> tuple[set[str], set[str]]:
        """Whose answers to round ``started`` the open round ``round_index`` may take, and who has given one already.

        A round that has not begun awaits nobody.

        Raises:
            NotFoundError: ``round_index`` was never opened.
        """
        with self._database.read() as session:
            return _runs.awaited(session, run_id, started, round_index)

    def answer_of(self, client_id: str, run_id: str, started: int) -> tuple[int, str | None] | None:
        """The round that took a client's answer to round ``started``, and why it does not count; None: none has."""
        with self._database.read() as session:
            return _runs.answer_of(session, client_id, run_id, started)

    def answers(self, run_id: str) -> list[tuple[int, str, bool]]:
        """What the committed rounds of a run took: the round, whose answer, and whether it counts."""
        with self._database.read() as session:
            return _runs.answers(session, run_id)

    def participation(self) -> dict[str, Participation]:
        """How the rounds of every client went that took part in one, over all runs."""
        with self._database.read() as session:
            return _runs.participation(session)

    def conduct(self, rounds: int) -> dict[str, UpdateStatistics]:
        """How clients' noised updates looked in the latest so many committed rounds, of all runs together."""
        with self._database.read() as session:
            return _sketches.conduct(session, rounds)

    def add_sketches(self, histograms: Sequence[ClientHistogram], spec: HistogramSpec) -> int:
        """Keep what clients told of their data under one spec; one that is here already stays. How many are new."""
        with self._database.write() as session:
            return _sketches.add(session, histograms, spec, utc_now())

    def latest_sketches(self, until: datetime | None = None) -> dict[str, ClientHistogram]:
        """Each client's newest histogram, or its newest that is no younger than ``until``."""
        with self._database.read() as session:
            return _sketches.latest(session, until)

    def latest_sketch_spec(self, until: datetime) -> HistogramSpec | None:
        """What the newest histogram means that is no younger than ``until``; None where there is none."""
        with self._database.read() as session:
            return _sketches.latest_spec(session, until)

    def histogram_spec(self, digest: str) -> HistogramSpec | None:
        """What the counts of a histogram mean, by its ``spec_digest``; None where no such histogram was kept."""
        with self._database.read() as session:
            return _sketches.spec(session, digest)

    # --- versions and releases ---------------------------------------------------------------------------------------

    def version(self, version: str) -> ModelVersion:
        """One model version.

        Raises:
            NotFoundError: no such version.
        """
        with self._database.read() as session:
            return _versions.version(session, version)

    def versions(self, offset: int = 0, limit: int | None = None) -> list[ModelVersion]:
        """Model versions, newest first: v1.1.10 before v1.1.9."""
        with self._database.read() as session:
            return _versions.versions(session, offset, limit)

    def latest_version(self, run_id: str | None = None) -> ModelVersion | None:
        """The newest version that one run trained, or the newest of all; None before the first."""
        with self._database.read() as session:
            return _versions.latest_version(session, run_id)

    def release(
        self,
        version: str,
        artifacts: Mapping[str, str],
        envelopes: Mapping[str, str],
        reason: str,
        *,
        sequence: int | None = None,
        serve_variant: str | None = None,
    ) -> Release:
        """Offer a version to replicas and vehicles; harmless when it is the current one with the same artifacts.

        Args:
            version: a committed version; an older one is a roll-back.
            artifacts: variant -> digest of its blob.
            envelopes: variant -> signed manifest, JSON text.
            reason: why, for the history.
            sequence: the number that the manifests were signed under, to be sure that no other release took it.
            serve_variant: what the fleet runs from now on; None leaves it on what it runs.

        Raises:
            NotFoundError: no such version.
            ConflictError: there are no artifacts, or ``sequence`` is no longer the next number.
            LedgerFrozenError: an incident froze the ledger; roll-backs and switches pass all the same.
        """
        with self._database.write() as session:
            _ledger.check_not_frozen(session)
            return _versions.release(session, version, artifacts, envelopes, reason, sequence, serve_variant)

    def release_again(self, serve_variant: str, sign: Sign, reason: str) -> Release:
        """Offer the current version under a new number, with another variant for the fleet.

        ``sign`` is called inside the transaction and may not use this store.

        Raises:
            ConflictError: nothing is released yet.
        """
        with self._database.write() as session:
            return _versions.release_again(session, serve_variant, sign, reason)

    def release_derived(self, derivation: Derivation, sign: Sign, reason: str, serve_variant: str | None) -> Release:
        """Make a version above all others from an older one's weights, and offer it, in one transaction.

        ``sign`` is called inside the transaction and may not use this store.

        Raises:
            NotFoundError: no such origin.
            ConflictError: there are no artifacts.
        """
        with self._database.write() as session:
            return _versions.release_derived(session, derivation, sign, reason, serve_variant)

    def refuse_release(self, version: str, reason: str) -> ModelVersion:
        """Record why a version is not offered to replicas and vehicles.

        Raises:
            NotFoundError: no such version.
        """
        with self._database.write() as session:
            return _versions.refuse_release(session, version, reason)

    def release_of(self, version: str) -> Release | None:
        """The last release of a version, or None."""
        with self._database.read() as session:
            return _versions.release_of(session, version)

    def next_release_sequence(self) -> int:
        """The number that the next release gets, from 1."""
        with self._database.read() as session:
            return _versions.next_release_sequence(session)

    def current_release(self) -> Release | None:
        """What replicas and vehicles are told to run now, or None."""
        with self._database.read() as session:
            return _versions.current_release(session)

    def releases(self) -> list[Release]:
        """All releases, oldest first."""
        with self._database.read() as session:
            return _versions.releases(session)

    def blob_digests(self) -> set[str]:
        """Every blob that a version or a release names."""
        with self._database.read() as session:
            return _versions.blob_digests(session)

    # --- privacy ledger ----------------------------------------------------------------------------------------------

    def append_charges(self, charges: Sequence[Charge], check: Callable[[Sequence[Charge]], None]) -> int:
        """Write the charges that are not on the ledger yet, all or none; return how many were written.

        ``check`` gets the new ones under the write lock and refuses by raising (the accountant raises
        BudgetExhaustedError); it may read this store, never write to it. It is not called when nothing is new.

        Raises:
            LedgerFrozenError: an incident froze the ledger.
            ConflictError: a release is on the ledger already with another cost.
            IntegrityError: the end of the ledger is not where it was left.
        """
        with self._database.write() as session:
            return _ledger.append_charges(session, charges, check)

    def is_charged(self, run_id: str, round_index: int, unit_id: str, output_id: str) -> bool:
        """Whether the ledger has the charge of this very release."""
        with self._database.read() as session:
            return _ledger.is_charged(session, run_id, round_index, unit_id, output_id)

    def check_not_frozen(self) -> None:
        """Make sure that charges may be written.

        Raises:
            LedgerFrozenError: they may not, and why.
        """
        with self._database.read() as session:
            _ledger.check_not_frozen(session)

    def freeze_ledger(self, wish: LedgerFreeze) -> LedgerFreeze:
        """Let nothing be charged, and no trained version be released, until each incident that froze it is over.

        Returns the freeze in force, which is the first incident's.
        """
        with self._database.write() as session:
            return _ledger.freeze(session, wish)

    def ledger_freeze(self) -> LedgerFreeze | None:
        """Why the ledger is frozen, or None."""
        with self._database.read() as session:
            return _ledger.frozen(session)

    def thaw_ledger(self, incident_id: str) -> LedgerFreeze | None:
        """Lift one incident's freeze; return the one that is in force for another. Harmless where there is none.

        Raises:
            ConflictError: the ledger is frozen, and not by this incident.
        """
        with self._database.write() as session:
            return _ledger.thaw(session, incident_id)

    def ledger_lines(self) -> Iterator[dict[str, Any]]:
        """The ledger as it is stored, hashes included, oldest line first; read to the end, or closed."""
        with self._database.read() as session:
            yield from _ledger.CHAIN.dump(session)

    def thaw_restored_ledger(self) -> LedgerFreeze | None:
        """Lift the freeze of a state that came from a backup and return what it was; harmless where there is none."""
        with self._database.write() as session:
            return _ledger.thaw_copy(session)

    def verify_ledger(self) -> int:
        """Recompute the hash chains of ledger and budget periods; return the number of ledger entries.

        Raises:
            IntegrityError: naming the first sequence that is not as it was written.
        """
        with self._database.read() as session:
            _budget.CHAIN.verify(session)
            return _ledger.CHAIN.verify(session)

    def ledger(self, since: datetime | None = None, limit: int | None = None, after: int = 0) -> list[LedgerEntry]:
        """Ledger entries with a sequence above ``after`` and not older than ``since``, oldest first."""
        with self._database.read() as session:
            return _ledger.ledger(session, since, limit, after)

    def grant_budget(
        self,
        target_epsilon: float,
        justification: str,
        requested_by: str,
        approved_by: str | None = None,
        *,
        call_key: str | None = None,
    ) -> BudgetPeriod:
        """Begin a new budget period: only what is charged from now on counts against it. Nothing spent is forgotten.

        A call repeated under the same ``call_key`` begins none. The freeze of a restored state is lifted.

        Raises:
            IntegrityError: the end of the ledger, or of the list of periods, is not where it was left.
        """
        with self._database.write() as session:
            return _budget.grant(session, target_epsilon, justification, requested_by, approved_by, call_key)

    def budget_period(self) -> BudgetPeriod | None:
        """The period in force; None in the first one, which is that of the settings."""
        with self._database.read() as session:
            return _budget.current(session)

    def budget_periods(self) -> list[BudgetPeriod]:
        """All periods that were granted, oldest first."""
        with self._database.read() as session:
            return _budget.periods(session)

    def budget_period_lines(self) -> Iterator[dict[str, Any]]:
        """Every budget period with its hashes, oldest first, as it is stored."""
        with self._database.read() as session:
            yield from _budget.CHAIN.dump(session)

    def ask_for_budget(self, new_epsilon: float, justification: str, requested_by: str, at: datetime) -> BudgetRequest:
        """Keep a request for a second person to approve within 24 hours."""
        with self._database.write() as session:
            return _budget.ask(session, new_epsilon, justification, requested_by, at)

    def take_budget_request(self, request_id: str, approved_by: str, at: datetime) -> BudgetRequest:
        """Approve a request and take it off the list; it grants one budget at most.

        Raises:
            NotFoundError: no such request, or it has expired.
            ForbiddenError: who approves is who asked.
        """
        with self._database.write() as session:
            return _budget.take(session, request_id, approved_by, at)

    # --- access ------------------------------------------------------------------------------------------------------

    def add_token(self, token: Token) -> None:
        """Insert a token."""
        with self._database.write() as session:
            _tokens.add_token(session, token)

    def token(self, token_id: str) -> Token:
        """One token.

        Raises:
            NotFoundError: no such token.
        """
        with self._database.read() as session:
            return _tokens.token(session, token_id)

    def tokens(self) -> list[Token]:
        """All tokens, revoked ones included, oldest first."""
        with self._database.read() as session:
            return _tokens.tokens(session)

    def revoke_token(self, token_id: str, at: datetime) -> Token:
        """End a token; harmless when it is ended already, the first moment stands.

        Raises:
            NotFoundError: no such token.
        """
        with self._database.write() as session:
            return _tokens.revoke_token(session, token_id, at)

    def touch_tokens(self, used: Mapping[str, datetime]) -> None:
        """Remember when these tokens were used last."""
        with self._database.write() as session:
            _tokens.touch_tokens(session, used)

    def append_audit(self, facts: AuditFacts) -> int:
        """Write one line of the audit trail; return its sequence.

        Raises:
            IntegrityError: the end of the trail is not where it was left.
        """
        with self._database.write() as session:
            return _audit.append_audit(session, facts)

    def audit(self, after: int = 0, limit: int | None = None) -> list[AuditEntry]:
        """Lines of the audit trail behind sequence ``after``, oldest first."""
        with self._database.read() as session:
            return _audit.audit(session, after, limit)

    def latest_audit(self, limit: int) -> list[AuditEntry]:
        """The last lines of the audit trail, oldest of them first."""
        with self._database.read() as session:
            return _audit.latest_audit(session, limit)

    def audit_between(self, since: datetime, until: datetime, limit: int) -> list[AuditEntry]:
        """Lines of the audit trail from ``since`` to ``until``, both included, oldest first, at most ``limit``."""
        with self._database.read() as session:
            return _audit.audit_between(session, since, until, limit)

    def audit_lines(self) -> Iterator[dict[str, Any]]:
        """The audit trail as it is stored, hashes included, oldest line first; read to the end, or closed."""
        with self._database.read() as session:
            yield from _audit.CHAIN.dump(session)

    def verify_audit(self) -> int:
        """Recompute the hash chain; return the number of lines.

        Raises:
            IntegrityError: naming the first sequence that is not as it was written.
        """
        with self._database.read() as session:
            return _audit.CHAIN.verify(session)

    def begin_request(self, request: RequestKey, at: datetime, *, repeatable: bool = False) -> StoredAnswer | None:
        """Claim an idempotency key (None), or give the answer that its request already got.

        What is ``repeatable`` is not kept waiting for a request under way, whose process may have died.

        Raises:
            ConflictError: the key was used for something else, or its request is still under way.
        """
        with self._database.write() as session:
            return _idempotency.begin_request(session, request, at, repeatable)

    def finish_request(self, request: RequestKey, answer: StoredAnswer | None) -> None:
        """Keep the answer for repetitions; None forgets the request, so that it may be tried again."""
        with self._database.write() as session:
            _idempotency.finish_request(session, request, answer)

    # --- long operations ---------------------------------------------------------------------------------------------

    def create_operation(
        self, kind: str, params: Mapping[str, Any], *, call_key: str | None = None
    ) -> tuple[Operation, bool]:
        """A queued operation and True; or the one that was created under the same key, and False.

        Raises:
            ConflictError: the key was used for another request.
        """
        with self._database.write() as session:
            return _operations.create_operation(session, kind, params, call_key)

    def operation_key_exists(self, call_key: str) -> bool:
        """Whether an operation was created under that key."""
        with self._database.read() as session:
            return _operations.key_exists(session, call_key)

    def operation(self, operation_id: str) -> Operation:
        """One operation.

        Raises:
            NotFoundError: no such operation.
        """
        with self._database.read() as session:
            return _operations.operation(session, operation_id)

    def operations(self, *statuses: OperationStatus, offset: int = 0, limit: int | None = None) -> list[Operation]:
        """Operations, newest first; no statuses filter nothing."""
        with self._database.read() as session:
            return _operations.operations(session, statuses, offset, limit)

    def begin_operation(self, operation_id: str) -> Operation:
        """Move an operation to RUNNING, unless it has ended or is to be cancelled."""
        with self._database.write() as session:
            return _operations.begin_operation(session, operation_id)

    def advance_operation(self, operation_id: str, progress: float, stage: str) -> Operation:
        """Record how far an operation has come; ``progress`` from 0 to 1."""
        with self._database.write() as session:
            return _operations.advance_operation(session, operation_id, progress, stage)

    def end_operation(
        self,
        operation_id: str,
        status: OperationStatus,
        *,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> Operation:
        """Give an operation its end; the first one stays."""
        with self._database.write() as session:
            return _operations.end_operation(session, operation_id, status, result, error)

    def cancel_operation(self, operation_id: str) -> Operation:
        """Cancel a queued operation at once, ask a running one to end, leave an ended one as it is.

        Raises:
            NotFoundError: no such operation.
        """
        with self._database.write() as session:
            return _operations.cancel_operation(session, operation_id)

    # --- incidents ---------------------------------------------------------------------------------------------------

    def record_alerts(self, alerts: Iterable[Alert], *, reopen_within: timedelta, at: datetime) -> list[str]:
        """Take in what fires and what has ended, once however often it is told; return the incidents concerned."""
        with self._database.write() as session:
            return _incidents.record_alerts(session, alerts, reopen_within, at)

    def end_alerts(self, fingerprint: str, at: datetime) -> list[str]:
        """End whatever fires under a fingerprint; return the incidents concerned."""
        with self._database.write() as session:
            return _incidents.end_alerts(session, fingerprint, at)

    def note_incident(self, incident_id: str, event: IncidentEvent) -> None:
        """Add a line to an incident's history.

        Raises:
            NotFoundError: no such incident.
        """
        with self._database.write() as session:
            _incidents.note(session, incident_id, event)

    def incident(self, incident_id: str) -> Incident:
        """One incident.

        Raises:
            NotFoundError: no such incident.
        """
        with self._database.read() as session:
            return _incidents.incident(session, incident_id)

    def incidents(self, *, is_open: bool | None = None, offset: int = 0, limit: int | None = None) -> list[Incident]:
        """Incidents, newest first; None filters nothing."""
        with self._database.read() as session:
            return _incidents.incidents(session, is_open, offset, limit)

    def open_incidents(self) -> dict[Severity, int]:
        """How many incidents are open, for every severity."""
        with self._database.read() as session:
            return _incidents.open_by_severity(session)

    def incident_alerts(self, incident_id: str) -> list[LoggedAlert]:
        """The alerts of an incident, in the order in which they began."""
        with self._database.read() as session:
            return _incidents.incident_alerts(session, incident_id)

    def incident_events(self, incident_id: str) -> list[IncidentEvent]:
        """The history of an incident, as it was told."""
        with self._database.read() as session:
            return _incidents.incident_events(session, incident_id)

    def claim_remediation(self, wish: Remediation, check: Callable[[Standing], str | None]) -> Remediation | None:
        """Take a remediation on, or withhold it for the reason that ``check`` names; None where it was taken on before.

        ``check`` is asked inside the transaction and may not use this store.
        """
        with self._database.write() as session:
            return _remediations.claim(session, wish, check)

    def finish_remediation(self, claimed: Remediation, outcome: RemediationOutcome, detail: str) -> Remediation:
        """Say what came of a remediation that was taken on."""
        with self._database.write() as session:
            return _remediations.finish(session, claimed, outcome, detail)

    def remediations(self, incident_id: str) -> list[Remediation]:
        """What the system did about an incident by itself, and what it withheld, in order."""
        with self._database.read() as session:
            return _remediations.remediations(session, incident_id)

    def timeline_events(self, since: datetime, until: datetime) -> list[TimelineEvent]:
        """What the state records from ``since`` to ``until``: runs, releases, operations, quarantines; in order."""
        with self._database.read() as session:
            return _timeline.timeline_events(session, since, until)

    def round_tally(self, since: datetime, until: datetime) -> RoundTally:
        """What became of the rounds from ``since`` to ``until``."""
        with self._database.read() as session:
            return _timeline.round_tally(session, since, until)

    def quarantined_between(self, since: datetime, until: datetime) -> list[str]:
        """The clients that came into quarantine then and are still in it, sorted."""
        with self._database.read() as session:
            return _timeline.quarantined_between(session, since, until)

    def change_counter(self) -> int:
        """A number that differs from an earlier one if anything was committed in between, by whatever process.

        Cheap enough to ask at every request; equal numbers mean that whatever was read then is still the truth.
        """
        return self._database.change_counter()

    # --- meta --------------------------------------------------------------------------------------------------------

    def get_meta(self, key: str) -> Any | None:
        """The JSON value under ``key``, or None. Polled: what nobody can have changed since is not read again."""
        counter = self._database.change_counter()
        kept_at, kept = self._meta
        if kept_at != counter:
            kept = {}
            self._meta = counter, kept
        if key not in kept:
            with self._database.read() as session:
                kept[key] = _fleet.get_meta(session, key)
        return deepcopy(kept[key])

    def set_meta(self, key: str, value: Any) -> None:
        """Store a JSON value under ``key``.

        Raises:
            ConflictError: the store keeps that key for itself.
        """
        self.change_meta(key, lambda _: value)

    def change_meta(self, key: str, change: Callable[[Any | None], Any]) -> Any:
        """Replace the JSON value under ``key`` by what ``change`` makes of it, and return that; one transaction.

        ``change`` may refuse by raising; it may not use this store.

        Raises:
            ConflictError: the store keeps that key for itself.
        """
        if key in _OWN_KEYS:
            raise ConflictError(f"The store keeps the key {key!r} for itself.", cure="Use another key.")
        with self._database.write() as session:
            value = change(_fleet.get_meta(session, key))
            _fleet.set_meta(session, key, value)
            return value
