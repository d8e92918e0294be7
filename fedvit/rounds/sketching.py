"""Asks a round's clients for sketches of their data, once they are charged, and keeps what they tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from fedvit.config import Settings
from fedvit.errors import BudgetExhaustedError, LedgerFrozenError
from fedvit.ports import AccountantPort, Charge, FleetPort, ServerModelPort
from fedvit.privacy.events import Composed, Event, Gaussian, Repeated
from fedvit.privacy.round_cost import charge_of, is_sketched, round_event
from fedvit.store.store import Store
from fedvit.types import Run
from fedvit.wire.sketch import Sketch, SketchOrder, SketchSpec, checked_counts


class Sketching:
    """The sketches of a run, beside its rounds: a round never waits for one, and none holds a round up."""

    def __init__(
        self, settings: Settings, store: Store, accountant: AccountantPort, fleet: FleetPort, model: ServerModelPort
    ) -> None:
        self._settings, self._store, self._accountant = settings, store, accountant
        self._fleet, self._model = fleet, model

    def ask(self, run: Run, round_index: int, client_ids: Sequence[str]) -> tuple[str, ...]:
        """Charge and ask those of the clients whose budget bears it beside the rest of the run; who they are.

        A round that is tried again asks again: what is charged already costs nothing, and clients repeat themselves.
        """
        spec = self._spec if is_sketched(self._settings, round_index) and client_ids else None
        if spec is None:
            return ()
        noise_multiplier, unit = self._settings.sketches.noise_multiplier, self._settings.privacy.privacy_unit
        order = SketchOrder(run.run_id, round_index, noise_multiplier, unit, spec)
        sizes = self._store.num_examples(client_ids)
        try:
            able = self._accountant.within_budget(self._charges(order, sizes, self._with_the_rest(run, round_index)))
            asked = {client_id: size for client_id, size in sizes.items() if client_id in able}
            self._accountant.charge(self._charges(order, asked, Gaussian(noise_multiplier)))
        except (BudgetExhaustedError, LedgerFrozenError):
            return ()
        if asked:
            self._fleet.ask_sketches(order, sorted(asked))
        return tuple(sorted(asked))

    def gather(self) -> int:
        """Keep what has arrived; how many sketches are new."""
        spec, arrived = self._spec, self._fleet.sketches()
        if spec is None or not arrived:
            return 0
        return self._store.add_sketches([sketch for sketch in arrived if _fits(sketch, spec)], spec)

    @cached_property
    def _spec(self) -> SketchSpec | None:
        return self._model.sketch_spec()

    def _with_the_rest(self, run: Run, round_index: int) -> Event:
        """A sketch, and all rounds that are still to come: these are what the budget is for."""
        sketch, left = Gaussian(self._settings.sketches.noise_multiplier), run.rounds_total - round_index
        if left < 1:
            return sketch
        return Composed((sketch, Repeated(round_event(self._settings, run.noise_multiplier), left)))

    def _charges(self, order: SketchOrder, sizes: Mapping[str, int], event: Event) -> list[Charge]:
        return [
            charge_of(
                event,
                run_id=order.run_id,
                round_index=order.round_index,
                unit_id=client_id,
                release_id=order.release_id(client_id, size),
                unit=order.privacy_unit,
            )
            for client_id, size in sizes.items()
        ]


def _fits(sketch: Sketch, spec: SketchSpec) -> bool:
    return sketch.spec_digest == spec.digest and checked_counts(spec, sketch.counts) == sketch.counts
