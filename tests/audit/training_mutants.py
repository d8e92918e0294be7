"""Faults that code of private training has had elsewhere: clipping, noise, sampling, ranks and the ledger."""

from __future__ import annotations

from tests.audit.mutant import CHARGING, CLIENTS, LATE, NOISE, RANKS, RECORDS, ROUND, SAMPLING, STEP, Mutant

_FACTORS = "return torch.where(finite, (l2_clip_norm / (norms + _NORM_MARGIN)).clamp(max=1.0), 0.0)"
_SUMS = "return recorder.weighted_sums(self.factors(recorder.norms(), l2_clip_norm), last=True)"
_OF_THE_WHOLE = """
            sums = recorder.weighted_sums(torch.isfinite(recorder.norms()).float())
            norm = torch.stack([each.norm() for each in sums.values()]).norm()
            return {name: each * (l2_clip_norm / norm).clamp(max=1.0) for name, each in sums.items()}"""
CHARGE = "self._accountant.charge(self._protection.charges(task, cohort.client_ids, plan))"
_TRAINED = """trained, run = self._trained, self.run
        if trained is None:"""

TRAINING_MUTANTS = (
    Mutant(
        "half the noise on a step",
        "dp/dpsgd.py",
        STEP,
        (("deviation = self.noise_multiplier *", "deviation = 0.5 * self.noise_multiplier *"),),
    ),
    Mutant(
        "half the noise on a round",
        "rounds/protection.py",
        ROUND,
        (("noise = self._sum_noise_multiplier(run)", "noise = 0.5 * self._sum_noise_multiplier(run)"),),
    ),
    Mutant(
        "half the noise, by a trainer that passes half on",
        "clients/local.py",
        NOISE,
        (("noise_multiplier=task.noise_multiplier if", "noise_multiplier=task.noise_multiplier / 2 if"),),
    ),
    Mutant(
        "no clipping of records",
        "dp/gradients.py",
        RECORDS,
        ((_FACTORS, "return torch.where(finite, torch.ones_like(norms), 0.0)"),),
    ),
    Mutant(
        "no clipping of clients",
        "privacy/mechanism.py",
        CLIENTS,
        (("return 1.0 if within else l2_clip_norm / norm, within", "return 1.0, within"),),
    ),
    Mutant(
        "every step the same noise",
        "clients/local.py",
        NOISE,
        (('_stream(secret, "noise", output, step)', '_stream(secret, "noise", output, 0)'),),
    ),
    Mutant(
        "every release the same noise",
        "clients/local.py",
        NOISE,
        (('{"release": output, "step": step}', '{"step": step}'),),
    ),
    Mutant(
        "every round of clients the same noise",
        "rounds/protection.py",
        NOISE,
        (('{"run_id": run_id, "round_index": round_index, "key": key}', '{"run_id": run_id}'),),
    ),
    Mutant(
        "shuffled batches",
        "clients/local.py",
        SAMPLING,
        (
            (
                ".coins(len(labels), task.sampling_prob)",
                ".uniform(len(labels)).argsort() < round(task.sampling_prob * len(labels))",
            ),
        ),
    ),
    Mutant(
        "cohorts of a fixed size",
        "cohort/selection.py",
        SAMPLING,
        (
            (
                "stream.coins(pool.size(), config.sampling_prob)",
                "(stream.uniform(pool.size()).argsort() < round(config.sampling_prob * pool.size()))",
            ),
        ),
    ),
    Mutant(
        "an answer counted twice",
        "rounds/update_admission.py",
        CLIENTS,
        (("for update in updates]", "for update in [*updates, *updates[:1]]]"),),
    ),
    Mutant(
        "late answers weighed up",
        "aggregation/staleness.py",
        LATE,
        (("return float((1 + staleness) ** -config.exponent)", "return float((1 + staleness) ** config.exponent)"),),
    ),
    Mutant(
        "division by the clients that answered",
        "rounds/protection.py",
        CLIENTS,
        (
            (
                "return float(run.config[EXPECTED_COHORT])",
                "return float(max(1, sum(o.error is None for u in updates for o in u.outcomes)))",
            ),
        ),
    ),
    Mutant(
        "division by the records that were drawn",
        "clients/local.py",
        RECORDS,
        (
            (
                "parts = drawn.split(self.physical_batch_size)",
                "optimizer.expected_batch_size = max(1, len(drawn))\n"
                "        parts = drawn.split(self.physical_batch_size)",
            ),
        ),
    ),
    Mutant(
        "a ledger lost on restart",
        "privacy/accountant.py",
        CHARGING,
        (
            (
                "self._lifetime = _Spends(self._settings.privacy.privacy_unit, after=0)",
                "unit, lines = self._settings.privacy.privacy_unit, len(self._store.ledger.entries())\n"
                "        self._lifetime = _Spends(unit, after=lines)",
            ),
        ),
    ),
    Mutant(
        "charged after the release",
        "rounds/execution.py",
        CHARGING,
        (
            (f"            {CHARGE}", "            self._charged_later = cohort"),
            (
                _TRAINED,
                f"cohort, (task, plan) = self._charged_later, self._charged_task\n        {CHARGE}\n        {_TRAINED}",
            ),
        ),
    ),
    Mutant(
        "channels_last left alone, for Opacus",
        "dp/opacus_gradients.py",
        RECORDS,
        (("self._wrapped(features.contiguous())", "self._wrapped(features)"),),
    ),
    Mutant(
        "channels_last left alone, for book-keeping",
        "dp/interceptor.py",
        RECORDS,
        (
            (
                "whole = images[:, :, : rows * height, : columns * width]",
                "whole = images.as_strided(images.shape, torch.empty(images.shape).stride())\n"
                "    whole = whole[:, :, : rows * height, : columns * width]",
            ),
        ),
    ),
    Mutant(
        "numbers without dimensions left out of the norm",
        "privacy/mechanism.py",
        CLIENTS,
        (("for a in update.values()))", "for a in update.values() if np.ndim(a)))"),),
    ),
    Mutant("a micro-batch clipped as a whole", "dp/bookkeeping.py", RECORDS, ((_SUMS, _OF_THE_WHOLE.strip()),)),
    Mutant(
        "noise on every micro-batch",
        "clients/local.py",
        RECORDS,
        (("do_skip=position < len(parts)", "do_skip=False"),),
    ),
    Mutant(
        "an example that is no number in the sum",
        "dp/gradients.py",
        RECORDS,
        ((_FACTORS, "return (l2_clip_norm / (norms + _NORM_MARGIN)).clamp(max=1.0)"),),
    ),
    Mutant(
        "biases left out of the norm",
        "dp/recorder.py",
        RECORDS,
        (("ones = self.inputs, self.outputs, float(self.bias is not None)", "ones = self.inputs, self.outputs, 0.0"),),
    ),
    Mutant(
        "norms without the cross terms of tokens",
        "dp/recorder.py",
        RECORDS,
        (
            (
                "square: Tensor = product[:, :, first:].sum(dim=(1, 2))",
                "square: Tensor = product[:, :, first:].diagonal(dim1=1, dim2=2).sum(dim=1)",
            ),
        ),
    ),
    Mutant(
        "norms and sums rounded by autocast, for Opacus",
        "dp/opacus_gradients.py",
        RECORDS,
        (("with torch.autocast(features.device.type, enabled=False):", "if True:"),),
    ),
    Mutant(
        "tokens without a gradient left out of products that are no numbers",
        "dp/autograd.py",
        RECORDS,
        (("return tokens if all(map(_ordinary, (gradient[:, tokens], inputs, weight))) else None", "return tokens"),),
    ),
    Mutant("equal seeds on ranks", "finetune/ranks.py", RANKS, ((', "block": block}', "}"),)),
    Mutant(
        "every rank on all records",
        "finetune/ranks.py",
        RANKS,
        (("return drawn[self.index :: self.count]", "return drawn"),),
    ),
    Mutant(
        "ranks without a record stay away",
        "finetune/ranks.py",
        RANKS,
        (("        super().step(", "        if len(self._ranks.own(drawn)):\n            super().step("),),
    ),
    Mutant(
        "ranks that all divide the noise",
        "finetune/ranks.py",
        RANKS,
        ((".normal(len(own), dtype)", ".normal(len(own), dtype) / self._ranks.count"),),
    ),
    Mutant(
        "blocks of noise that no rank adds",
        "finetune/ranks.py",
        RANKS,
        (("blocks[self._ranks.index :: self._ranks.count]", "blocks[self._ranks.index :: 2 * self._ranks.count]"),),
    ),
)
