"""Ledger of a vehicle's outputs: one for each run, round and purpose, charged before it is computed.

The charge and the record of an output are written in one transaction, so they survive a crash and hold for all
processes of one home folder.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from edge_runtime.training.policy import Purpose, VehiclePolicy
from fedvit.errors import BudgetExhaustedError, ConflictError, IntegrityError
from fedvit.ports import Charge, ClockPort
from fedvit.privacy.accountant import PrivacyAccountant, epsilon_above
from fedvit.settings import load_settings
from fedvit.store.store import Repositories, Store

_LOG = logging.getLogger(__name__)
_KEY = "vehicle_output"
_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Output:
    """One mechanism output of the vehicle.

    Attributes:
        charge: its cost; ``charge.output_id`` is what the server charged.
        digest: SHA-256, hex, of all that determines the output, also of what only the vehicle knows.
        attempt: of the round, under secure aggregation: each one is charged, and has its own noise.
    """

    purpose: Purpose
    charge: Charge
    digest: str
    attempt: int = 0

    @property
    def key(self) -> str:
        """Metadata key of its record."""
        return record_key(self.purpose, self.charge.run_id, self.charge.round_index, self.attempt)


def record_key(purpose: Purpose, run_id: str, round_index: int, attempt: int = 0) -> str:
    """Metadata key of the record of the one output for a run, a round, an attempt of it and a purpose."""
    return f"{_KEY}/{purpose.value}/{run_id}/{round_index}" + (f"/{attempt}" if attempt else "")


class OutputLedger:
    """Charges outputs to the vehicle's own ledger, within the limits of its owner's policy.

    A record has the output's ``output_id`` and ``digest``; ``content``, the SHA-256 of the released bytes, once there
    are any; and ``refused``, how often another output was asked for in its place, with the latest one.
    """

    def __init__(self, store: Store, policy: VehiclePolicy, clock: ClockPort) -> None:
        self._store, self._policy, self._clock = store, policy, clock
        limits = {"target_epsilon": policy.max_epsilon, "target_delta": policy.target_delta}
        self._settings = load_settings(environ={}, overrides={"home": store.home, "privacy": limits})
        self._accountant = PrivacyAccountant(store, self._settings)

    def check(self, purpose: Purpose, run_id: str, round_index: int, output_id: str, attempt: int = 0) -> None:
        """Check that no other output was charged for this run, round and purpose; nothing has to be computed for it.

        Raises:
            ConflictError: there is another one.
        """
        key = record_key(purpose, run_id, round_index, attempt)
        record = self._store.metadata.get(key)
        if record is not None and record["output_id"] != output_id:
            raise self._refused(key, output_id)

    def charge(self, output: Output) -> None:
        """Charge and record an output; a repetition of the same one is charged once.

        Raises:
            ConflictError: another output was charged for its run, round and purpose.
            BudgetExhaustedError: the charge would exceed what the policy allows in all, or for 24 hours.
        """

        def admit(transaction: Repositories) -> None:
            record = transaction.metadata.get(output.key)
            if record is None:
                self._check_day(transaction, output.charge)
                fresh = {"output_id": output.charge.output_id, "digest": output.digest, "content": None}
                transaction.metadata.set(output.key, fresh)
            elif record["digest"] != output.digest:
                raise _OtherOutputError

        try:
            self._accountant.write([output.charge], admit)
        except _OtherOutputError:
            raise self._refused(output.key, output.digest) from None

    def release(self, output: Output, content: bytes) -> None:
        """Record the bytes of an output before they are sent.

        Raises:
            IntegrityError: other bytes were sent for it before, as happens on another number of threads.
        """
        digest = hashlib.sha256(content).hexdigest()
        with self._store.transaction() as transaction:
            record: dict[str, Any] = transaction.metadata.get(output.key) or {}
            if record.get("digest") != output.digest or record.get("content") not in (None, digest):
                raise IntegrityError(
                    f"The output for {_place(output.key)} differs from the one that was sent before.",
                    cure="Nothing was sent; take part in the next round with an unchanged installation.",
                )
            transaction.metadata.set(output.key, {**record, "content": digest})

    def _check_day(self, transaction: Repositories, charge: Charge) -> None:
        limit = self._policy.max_epsilon_per_day
        if limit is None:
            return
        since = self._clock.now() - _DAY
        charges = [entry.charge for entry in transaction.ledger.entries(since=since)]
        epsilon = epsilon_above(limit, [*charges, charge], self._settings)
        if epsilon is not None:
            raise BudgetExhaustedError(
                f"The outputs of 24 hours would have epsilon {epsilon:.4f}, above the budget of {limit} at delta "
                f"{self._policy.target_delta:g} that the owner's policy sets for a day.",
                cure="The vehicle takes part again when earlier outputs are a day old.",
                projected_epsilon=epsilon,
                target_epsilon=limit,
            )

    def _refused(self, key: str, wanted: str) -> ConflictError:
        """Record that another output was asked for; the error that says so."""
        with self._store.transaction() as transaction:
            record: dict[str, Any] = transaction.metadata.get(key) or {}
            refused = {"count": record.get("refused", {}).get("count", 0) + 1, "latest": wanted}
            refused["at"] = self._clock.now().isoformat()
            transaction.metadata.set(key, {**record, "refused": refused})
        _LOG.error("another output than the recorded one was asked for: %s", _place(key))
        return ConflictError(
            f"This vehicle has an output for {_place(key)} on its ledger already, and this task asks for another one.",
            cure="A vehicle has one output for each run, round and purpose; begin a new run.",
        )


class _OtherOutputError(Exception):
    """Another output is on record; undoes the transaction."""


def _place(key: str) -> str:
    _, purpose, run_id, round_index, *attempt = key.split("/")
    return f"{purpose} {round_index} of {run_id}" + (f", attempt {attempt[0]}" if attempt else "")
