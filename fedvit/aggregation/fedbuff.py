"""Buffered asynchronous aggregation (FedBuff, Nguyen et al. 2022, arXiv:2106.06639)."""

from __future__ import annotations

from fedvit.aggregation.fedavg import FedAvg


class FedBuff(FedAvg):
    """``w <- w + eta / K * sum_k a(s_k) (w_k - w_start_k)`` over the K updates of a buffer, each a client's.

    a is ``training.staleness``: a fresh update counts 1, an older one less. Every client weighs the same. It takes
    single updates, so that an asynchronous buffer holds exactly ``buffer_size`` of them.
    """

    name = "fedbuff"
    needs = "single_updates"
    weighting = "uniform"
    client_level = "it takes single updates"
    instead = "Use fedavg."
