"""Settings keys that have a new name; the old one is refused with a pointer to the new."""

RENAMED_KEYS = {
    "training.door": "training.validation",
    "training.first_mode": "training.initial_mode",
    "training.validation.quarantine_after": "training.validation.quarantine_after_rejections",
    "model.hybrid.bands": "model.hybrid.pooling_bands",
    "workload.clients": "workload.clients_class",
    "privacy.second_approver": "privacy.require_second_approver",
    "sketches": "histograms",
    "release.min_agreement": "release.min_export_agreement",
    "access.acknowledge_proxy": "access.behind_tls_proxy",
    "fleet.look_every_s": "fleet.check_interval_s",
    "simulation.delays.client_share": "simulation.delays.client_variance_share",
    "simulation.delays.dropout_noticed_s": "simulation.delays.dropout_detection_s",
    "simulation.delays.given_up_stops": "simulation.delays.stop_on_cancel",
    "simulation.faults.deviation": "simulation.faults.noise_stddev",
    "rehearsal": "drill",
    "drill.faults.deviation": "drill.faults.noise_stddev",
}
"""Old key to new key, both as dotted paths without the indices of lists."""
