"""Check of fine-tuning jobs: each range of steps is charged before it is taken, and a resumed job has fresh noise."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedvit.config import Settings
from fedvit.finetune.job import Finetuning
from fedvit.finetune.ranks import Ranks
from fedvit.ports import POPULATION, Charge
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import PoissonGaussian
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.tools.audit.findings import Finding, Scope
from fedvit.tools.audit.observe import Release, released_steps
from fedvit.tools.audit.pictures import png, random_images
from fedvit.tools.audit.randomness import noise_faults
from fedvit.tools.audit.runs import FIXED_KEY, write_key

CHECK = "fine-tuning"
_STEPS, _RANGE = 6, 2
Files = Mapping[str, bytes]


@dataclass
class _Job:
    """A job on a state folder.

    Attributes:
        releases: of all steps, in order.
        charged: how many steps were charged when a step was taken, by step.
    """

    settings: Settings
    releases: list[Release] = field(default_factory=list)
    charged: list[int] = field(default_factory=list)

    def run(self, checkpoint: Files | None = None) -> Files:
        """Take the remaining steps; the files of the last checkpoint."""
        saved: list[Files] = []
        with Store.open(self.settings.home) as store, released_steps() as releases:
            accountant = PrivacyAccountant(store, self.settings)

            def charge(charges: Sequence[Charge]) -> None:
                self._note_steps(len(releases), store)
                accountant.write(charges)

            def save(step: int, files: Files) -> None:
                self._note_steps(len(releases), store)
                saved.append(files)

            outcome = Finetuning(self.settings, Ranks(), charge=charge, save=save).run(checkpoint)
        self.releases += releases
        if outcome.error is not None or not saved:
            raise RuntimeError(f"the job ended after {outcome.steps} steps: {outcome.error}")
        return saved[-1]

    def _note_steps(self, taken: int, store: Store) -> None:
        charges = [entry.charge for entry in store.ledger.entries()]
        steps = sum(charge.steps for charge in charges if charge.unit_id == POPULATION)
        self.charged += [steps] * (len(self.releases) + taken - len(self.charged))


def check(scope: Scope) -> Iterator[Finding]:
    """A job that is resumed after its first range, and the same with another key."""
    with tempfile.TemporaryDirectory() as folder:
        _write_pictures(Path(folder) / "pictures")
        job, epsilon = _resumed(Path(folder), scope, FIXED_KEY)
        other, _ = _resumed(Path(folder), scope, FIXED_KEY[::-1])
    faults = [f"step {step} is taken when {n} are charged" for step, n in enumerate(job.charged, 1) if n < step]
    expected = epsilon_pld({PoissonGaussian(scope.noise_multiplier, scope.sampling_prob): _STEPS}, scope.target_delta)
    if abs(epsilon - expected) > 1e-9:
        faults.append(f"epsilon is {epsilon:.6f}; what was released costs {expected:.6f}")
    yield Finding.of(CHECK, "charges", faults, f"{_STEPS} steps, in ranges that are charged before they are taken")
    deviation = scope.noise_multiplier * scope.l2_clip_norm
    faults = list(noise_faults(job.releases, deviation))
    yield Finding.of(CHECK, "noise, with a restart", faults, f"{len(job.releases)} steps, of the charged deviation")
    both = [job.releases[0], other.releases[0]]
    faults = list(noise_faults(both, deviation))
    yield Finding.of(CHECK, "another key", faults, "the noise of the same step is unrelated")


def _resumed(folder: Path, scope: Scope, key: bytes) -> tuple[_Job, float]:
    """A job in two processes, and its epsilon on the ledger."""
    home = folder / key.hex()[:8]
    write_key(home, key)
    job = _Job(_settings(home, scope, folder / "pictures", steps=_RANGE))
    checkpoint = job.run()
    job.settings = _settings(home, scope, folder / "pictures", steps=_STEPS)
    job.run(checkpoint)
    if len(job.releases) != _STEPS:
        raise RuntimeError(f"{_STEPS} steps add noise {len(job.releases)} times")
    with Store.open(home) as store:
        return job, PrivacyAccountant(store, job.settings).budget().epsilon_spent


def _settings(home: Path, scope: Scope, pictures: Path, steps: int) -> Settings:
    privacy = {"noise_multiplier": scope.noise_multiplier, "sampling_prob": scope.sampling_prob}
    privacy |= {"l2_clip_norm": scope.l2_clip_norm, "target_delta": scope.target_delta, "target_epsilon": 1e6}
    overrides = {
        "home": home,
        "data": {"source": "folder", "path": pictures, "image_size": 32},
        "model": {"pretrained": False, "hybrid": {"width": 16, "heads": 2}},
        "privacy": privacy,
        "finetune": {"steps": steps, "checkpoint_every_steps": _RANGE, "learning_rate": 0.1},
    }
    return load_settings(environ={}, overrides=overrides)


def _write_pictures(folder: Path) -> None:
    images = random_images(12)
    for index, image in enumerate(images):
        place = folder / ("test" if index < 2 else "train") / ("even" if index % 2 else "odd")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index}.png").write_bytes(png(image))
