"""Faults of single mechanisms that can be configured, at clipping norms other than 1, and of the keys."""

from __future__ import annotations

from tests.audit.mutant import (
    CHARGED_NOISE,
    CHARGING,
    CLIENTS,
    FINETUNING,
    HISTOGRAMS,
    KEYS,
    LATE,
    NOISE,
    PARTICIPATIONS,
    RECORDS,
    Mutant,
)
from tests.audit.training_mutants import CHARGE

MECHANISM_MUTANTS = (
    Mutant(
        "noise of a step by the norm squared",
        "dp/dpsgd.py",
        NOISE,
        (("self.noise_multiplier * self.max_grad_norm", "self.noise_multiplier * self.max_grad_norm**2"),),
    ),
    Mutant(
        "noise of a round by the norm squared",
        "rounds/protection.py",
        NOISE,
        (("(run) * mechanism.sensitivity(task) *", "(run) * mechanism.sensitivity(task) ** 2 *"),),
    ),
    Mutant(
        "records clipped to the norm squared",
        "dp/gradients.py",
        RECORDS,
        (("torch.where(finite, (l2_clip_norm / (", "torch.where(finite, (l2_clip_norm**2 / ("),),
    ),
    Mutant(
        "clients clipped to the norm squared",
        "privacy/mechanism.py",
        CLIENTS,
        (("1.0 if within else l2_clip_norm / norm", "1.0 if within else l2_clip_norm**2 / norm"),),
    ),
    Mutant(
        "sums of clients that are not checked",
        "privacy/mechanism.py",
        CLIENTS,
        (("if not norm <= allowed * (1 + ROUNDING):", "if not math.isfinite(norm):"),),
    ),
    Mutant(
        "late updates added as they were clipped",
        "privacy/mechanism.py",
        LATE,
        (("min(1.0, l2_clip_norm / clipped_to)", "1.0"),),
    ),
    Mutant(
        "late updates taken as clipped to the present norm",
        "rounds/protection.py",
        LATE,
        (("((update, self.l2_clip_norm(run.run_id, update.round_index)) for", "((update, norm) for"),),
    ),
    Mutant(
        "late updates weighed up, by hinge",
        "aggregation/staleness.py",
        LATE,
        (("return 1 / (1 + config.hinge_slope *", "return (1 + config.hinge_slope *"),),
    ),
    Mutant(
        "half the noise on a histogram",
        "drift/measures.py",
        HISTOGRAMS,
        (("bounded + request.deviation *", "bounded + 0.5 * request.deviation *"),),
    ),
    Mutant(
        "histograms whose votes are left out of the sensitivity",
        "wire/histograms.py",
        HISTOGRAMS,
        (("math.sqrt(histograms + RISK_VOTES**2)", "math.sqrt(histograms)"),),
    ),
    Mutant(
        "histograms of clients without a bound",
        "drift/measures.py",
        HISTOGRAMS,
        (("bounded = counts if by_record else votes(counts, spec)", "bounded = counts"),),
    ),
    Mutant(
        "histograms of a secret sample",
        "privacy/round_cost.py",
        CHARGING,
        ((' or settings.training.cohort.selection == "poisson"', ""),),
    ),
    Mutant(
        "histograms that are not charged",
        "rounds/histogram_collection.py",
        CHARGING,
        (
            (
                "self._accountant.charge(self._charges(request, asked,",
                "self._accountant.check(self._charges(request, asked,",
            ),
        ),
    ),
    Mutant(
        "over-selected clients that are not charged",
        "rounds/execution.py",
        CHARGING,
        (
            (
                CHARGE,
                "wanted = cohort.client_ids[: self._settings.training.cohort.size]\n"
                "            self._accountant.charge(self._protection.charges(task, wanted, plan))",
            ),
        ),
    ),
    Mutant(
        "a secret sample of which only those drawn are charged",
        "rounds/protection.py",
        CHARGING,
        (("in ([POPULATION] if self.sampled else client_ids))", "in client_ids)"),),
    ),
    Mutant(
        "several steps charged as one",
        "privacy/round_cost.py",
        CHARGING,
        (
            (
                "return step if settings.training.local_steps == 1 else",
                "return step if settings.training.local_steps else",
            ),
        ),
    ),
    Mutant(
        "amplification without a sample",
        "privacy/round_cost.py",
        CHARGING,
        (("return Gaussian(noise_multiplier)\n", "return PoissonGaussian(noise_multiplier, privacy.sampling_prob)\n"),),
    ),
    Mutant(
        "a count of adaptive clipping that is not charged",
        "privacy/round_cost.py",
        CHARGING,
        (
            (
                "parts = Gaussian(sum_noise_multiplier(clip, noise_multiplier)), Gaussian(clip.count_noise_multiplier)",
                "parts = (Gaussian(sum_noise_multiplier(clip, noise_multiplier)),)",
            ),
        ),
    ),
    Mutant(
        "a task for records that were not charged",
        "rounds/remote.py",
        CHARGING,
        (("if not self.is_charged(task, client):", "if client.num_examples < 1:"),),
    ),
    Mutant(
        "a sum noised as if the count of adaptive clipping were free",
        "rounds/protection.py",
        CHARGED_NOISE,
        (("return sum_noise_multiplier(self._clip, run.noise_multiplier) if self._clip else", "return"),),
    ),
    Mutant(
        "a count of adaptive clipping without noise",
        "privacy/adaptive_clip.py",
        CHARGED_NOISE,
        ((" + config.count_noise_multiplier / 2 * noise", ""),),
    ),
    Mutant(
        "a count of adaptive clipping of bits that are not centred",
        "privacy/adaptive_clip.py",
        CHARGED_NOISE,
        (("within - contributors / 2 +", "within +"), ("0.5 + noised / expected", "noised / expected")),
    ),
    Mutant(
        "banded noise by columns that are too long",
        "privacy/correlated.py",
        CHARGED_NOISE,
        (("coefficients / np.linalg.norm(coefficients)", "coefficients"),),
    ),
    Mutant(
        "banded noise of which a restart forgets rounds",
        "privacy/correlated.py",
        CHARGED_NOISE,
        (
            (
                "for position in range(len(self._keys), len(before)):",
                "for position in range(max(len(self._keys), len(before) - 1), len(before)):",
            ),
        ),
    ),
    Mutant(
        "participations that are not apart",
        "cohort/selection.py",
        PARTICIPATIONS,
        (("self._round_index - history[c][1] >= apart)", "self._round_index - history[c][1] >= 1)"),),
    ),
    Mutant(
        "one participation more than the cap",
        "cohort/selection.py",
        PARTICIPATIONS,
        (("if history[client_id][0] < (cap or", "if history[client_id][0] <= (cap or"),),
    ),
    Mutant(
        "late updates that rest from the round they began in",
        "store/rounds.py",
        PARTICIPATIONS,
        (("(count, max(last, charged_last))", "(count, charged_last or last)"),),
    ),
    Mutant(
        "a root key that the path determines",
        "privacy/randomness.py",
        KEYS,
        (("create(SECRET_BYTES), mode", "hashlib.sha256(str(home).encode()).digest(), mode"),),
    ),
    Mutant(
        "a root key that others can read",
        "privacy/randomness.py",
        KEYS,
        (("mode=FILE_MODE)", "mode=0o644)"), ("    ensure_private([path])\n", "")),
    ),
    Mutant(
        "coins and noise from a public key",
        "privacy/randomness.py",
        KEYS,
        (("info=hashlib.sha256(info).digest()).derive(secret)", "info=hashlib.sha256(info).digest()).derive(info)"),),
    ),
    Mutant(
        "coins and noise of clients from a public key",
        "clients/host.py",
        KEYS,
        (('derive_secret(self._root_secret, f"{client_id}/', 'derive_secret(bytes(32), f"{client_id}/'),),
    ),
    Mutant(
        "noise on ranks from a public key",
        "finetune/ranks.py",
        KEYS,
        (('SecretStream(secret, "noise of a block"', 'SecretStream(bytes(32), "noise of a block"'),),
    ),
    Mutant(
        "noise of rounds from a public key",
        "rounds/protection.py",
        KEYS,
        (("derive_secret(load_or_create_root_secret(store.home),", "derive_secret(bytes(32),"),),
    ),
    Mutant(
        "a cohort drawn from a public key",
        "rounds/cohorts.py",
        KEYS,
        (("derive_secret(load_or_create_root_secret(context.store.home),", "derive_secret(bytes(32),"),),
    ),
    Mutant(
        "noise of histograms from a public key",
        "drift/client.py",
        KEYS,
        (("derive_secret(self._root_secret, f", "derive_secret(bytes(32), f"),),
    ),
    Mutant(
        "noise that does not depend on the weights",
        "privacy/randomness.py",
        KEYS,
        (("json.dumps(facts, sort_keys", 'json.dumps({**facts, "base_digest": ""}, sort_keys'),),
    ),
    Mutant(
        "noise that does not depend on the records",
        "clients/host.py",
        KEYS,
        (('f"{self.context_digest}/{data.digest}"', "self.context_digest"),),
    ),
    Mutant(
        "noise that does not depend on settings and model",
        "clients/host.py",
        KEYS,
        (('f"{self.context_digest}/{data.digest}"', "data.digest"),),
    ),
    Mutant(
        "noise that does not depend on the frozen part of the model",
        "config/root.py",
        KEYS,
        (('"frozen_digest": frozen_digest,', '"frozen_digest": "",'),),
    ),
    Mutant(
        "noise of a round that does not depend on the sum",
        "rounds/protection.py",
        KEYS,
        (("[mechanism.digest(sums), within, accepted]", "[within, accepted]"),),
    ),
    Mutant(
        "noise of a histogram that does not depend on its bins",
        "wire/histograms.py",
        KEYS,
        (("self.privacy_unit, self.spec.digest]", "self.privacy_unit]"),),
    ),
    Mutant(
        "noise of a histogram that does not depend on the records",
        "drift/client.py",
        KEYS,
        (('derived_from = f"{self._context_digest}/{counted.digest}"', "derived_from = self._context_digest"),),
    ),
    Mutant(
        "noise of a histogram that does not depend on settings and model",
        "drift/client.py",
        KEYS,
        (('derived_from = f"{self._context_digest}/{counted.digest}"', "derived_from = counted.digest"),),
    ),
    Mutant(
        "a resumed job that repeats its noise",
        "finetune/job.py",
        FINETUNING,
        (("first_step=step)", "first_step=0)"),),
    ),
    Mutant(
        "steps of a job charged after they are taken",
        "finetune/job.py",
        FINETUNING,
        (
            (
                "            if (error := self._charge_range(step, last)) is not None:\n"
                "                break\n"
                "            self._take_steps(optimizer, step, last)\n",
                "            self._take_steps(optimizer, step, last)\n"
                "            if (error := self._charge_range(step, last)) is not None:\n"
                "                break\n",
            ),
        ),
    ),
    Mutant(
        "noise of a job from a public key",
        "finetune/job.py",
        FINETUNING,
        (("derive_secret(load_or_create_root_secret(settings.home), f", "derive_secret(bytes(32), f"),),
    ),
)
