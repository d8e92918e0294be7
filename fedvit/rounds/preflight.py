"""Preflight check: one client is trained for one step on the code of a run, before the run charges anything."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from fedvit.aggregation.registry import rule_for
from fedvit.aggregation.rule import BROADCAST, RoundFacts, Rule, checked_fold
from fedvit.aggregation.validation import UpdateValidator
from fedvit.clients.tracebacks import location_in, traceback_of
from fedvit.clients.workload import WorkloadHost, WorkloadModel, load_workload
from fedvit.config import Settings
from fedvit.errors import FedvitError, ModelError, WorkloadError
from fedvit.ports import ClientHostPort
from fedvit.rounds.context import RoundBase, train_task
from fedvit.types import Client, ClientKind, ClientOutcome, TrainTask, Weights
from fedvit.updates import ClientFailures, EncodedUpdate, RingSum, UpdateBundle, UpdateMessage, WeightedUpdate
from fedvit.wire.tensors import weights_digest

if TYPE_CHECKING:
    from fedvit.data.partition import VirtualFleet

RUN = "preflight"
"""The run id of the check's task."""
_TRIED = 3
_CURE = "Nothing was charged. Mend it and start again."


def check_workload(settings: Settings) -> None:
    """Train one client of the workload, fold its update and evaluate the result; nothing of it is kept.

    The client is :attr:`fedvit.clients.workload.VirtualClients.public_client` if there is one, otherwise one of the
    first that have examples.

    Raises:
        WorkloadError: what would fail in a round; ``details["traceback"]`` is set if it is an error of the code.
    """
    workload = load_workload(settings)
    try:
        model = WorkloadModel(settings, workload)
        check = _Check(settings, WorkloadHost(settings, workload), model.initial_weights())
        if workload.public_client is None:
            clients = list(islice((c for c in workload.registered() if c.num_examples), _TRIED))
        else:
            clients = [Client(workload.public_client, ClientKind.VIRTUAL, 0)]
        model.evaluate(check.weights_after(clients))
    except FedvitError:
        raise
    except Exception as error:
        text = traceback_of(error)
        raise WorkloadError(_sentence(f"{type(error).__name__}: {error}", text), cure=_CURE, traceback=text) from error


def check_vision(settings: Settings, fleet: VirtualFleet) -> None:
    """Train one client with two made-up images, and fold its update; nothing of it is kept.

    Raises:
        FedvitError: what would fail in a round.
    """
    # Imported here: these load torch.
    import torch

    from fedvit.clients.host import ClientData, vision_host
    from fedvit.models.build import build_model
    from fedvit.models.trainable import trainable_weights

    classes, size = len(fleet.source.classes), settings.data.image_size
    model = build_model(settings.model, classes, size)
    images = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ClientData(model.features(images), torch.arange(2) % classes, RUN)

    class MadeUp:
        def load(self, client_id: str) -> ClientData:
            return data

    with tempfile.TemporaryDirectory(prefix="fedvit-preflight-") as folder:
        # Of its own, because a rule may store a client's state.
        own = settings.model_copy(update={"home": Path(folder)})
        host = vision_host(own, records=fleet, model=model, data=MadeUp())
        _Check(own, host, trainable_weights(model)).weights_after([Client(RUN, ClientKind.VIRTUAL, 2)])


@dataclass(frozen=True)
class _Check:
    """A round of one client, from these initial weights."""

    settings: Settings
    host: ClientHostPort
    initial: Weights

    def weights_after(self, clients: Sequence[Client]) -> Weights:
        """The weights after a round of the first of these clients whose training succeeds."""
        rule = rule_for(self.settings)
        base = RoundBase.of(rule, self.initial, weights_digest(self.initial), {})
        task = self._task(base)
        errors = list[ClientOutcome]()
        for client in clients:
            sizes = {client.client_id: client.num_examples} if client.num_examples else None
            message = self.host.train(task, base.sent, [client.client_id], None, sizes)
            failed = [outcome for outcome in message.outcomes if outcome.error is not None]
            if not failed:
                return self._folded(rule, base, task, message)
            errors += failed
        kind = ModelError if self.settings.workload.clients_class is None else WorkloadError
        if not errors:
            raise kind("There is no client that has examples.", cure="clients() yields ids and numbers of examples.")
        first = next((outcome for outcome in errors if outcome.traceback), errors[0])
        sentence = _sentence(str(first.error), first.traceback or "")
        raise kind(sentence, cure=_CURE, **({"traceback": first.traceback} if first.traceback else {}))

    def _folded(self, rule: Rule, base: RoundBase, task: TrainTask, message: UpdateMessage) -> Weights:
        (update,) = self._decoded(rule, base, task, message)
        updates = [update] * max(1, rule.least_updates)
        facts = RoundFacts(start=lambda _: base.weights)
        return checked_fold(rule, base.weights, rule.fold(base.weights, updates, {}, facts)).weights

    def _decoded(
        self, rule: Rule, base: RoundBase, task: TrainTask, message: UpdateMessage
    ) -> Iterator[WeightedUpdate]:
        broadcast = {name: array for name, array in base.sent.items() if name.startswith(BROADCAST)}
        validator = UpdateValidator.of(self.settings, rule, base.weights, task=task, broadcast=broadcast)
        for part in message.parts if isinstance(message, UpdateBundle) else (message,):
            update = validator.decoded(part) if isinstance(part, EncodedUpdate) else part
            if not isinstance(update, ClientFailures | RingSum):
                yield update

    def _task(self, base: RoundBase) -> TrainTask:
        privacy = self.settings.privacy
        task = train_task(
            self.settings,
            RUN,
            1,
            base_digest=base.sent_digest,
            data_digest="",
            noise_multiplier=privacy.noise_multiplier or 1.0,
            l2_clip_norm=privacy.l2_clip_norm,
            context_digest="",
        )
        # Every record is drawn: a step without records would not differentiate anything.
        task = replace(task, local_steps=1, sampling_prob=1.0)
        # Nothing leaves this process, and one client makes no secure sum.
        return replace(task, noise_at="server") if task.noise_place == "distributed" else task


def _sentence(error: str, text: str) -> str:
    place = location_in(text)
    return f"Training one client for one step fails: {error.rstrip('.')}{f' ({place})' if place else ''}."
