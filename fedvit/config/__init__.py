"""Typed settings by section: keys, types, bounds, defaults and descriptions. :mod:`fedvit.settings` loads them."""

from fedvit.config.base import LEAST_NOISE_MULTIPLIER
from fedvit.config.model import DataConfig, HybridConfig, ModelConfig, PartitionConfig
from fedvit.config.operation import AccessConfig, BackupConfig, FleetConfig, OidcConfig, RemediationConfig
from fedvit.config.privacy import PrivacyConfig, SecureAggregationConfig
from fedvit.config.root import Settings
from fedvit.config.tools import DelayConfig, FaultConfig, FaultKind, FinetuneConfig, RangeConfig, SweepConfig
from fedvit.config.training import CohortConfig, CompressionConfig, StalenessConfig, TrainingConfig

__all__ = [
    "LEAST_NOISE_MULTIPLIER",
    "AccessConfig",
    "BackupConfig",
    "CohortConfig",
    "CompressionConfig",
    "DataConfig",
    "DelayConfig",
    "FaultConfig",
    "FaultKind",
    "FinetuneConfig",
    "FleetConfig",
    "HybridConfig",
    "ModelConfig",
    "OidcConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "RangeConfig",
    "RemediationConfig",
    "SecureAggregationConfig",
    "Settings",
    "StalenessConfig",
    "SweepConfig",
    "TrainingConfig",
]
