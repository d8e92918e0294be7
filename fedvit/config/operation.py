"""Settings of the running system: releases, HTTP, vehicles, incidents, access, Ray."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fedvit.config.base import Port, PositiveFloat, PositiveInt, Probability, Section
from fedvit.types import MAX_INTERVAL_S, NEVER_AUTOMATIC, RemediationAction, Variant


class ReleaseConfig(Section):
    """When a committed version is exported, checked, signed and offered to replicas and vehicles."""

    every_rounds: PositiveInt = Field(10, description="Rounds from one release to the next.")
    variants: tuple[Variant, ...] = Field(
        (Variant.STANDARD, Variant.EDGE_OPTIMIZED), description="Exported variants of each released version."
    )
    serve_variant: Variant = Field(
        Variant.STANDARD, description="Variant that a new state folder serves, until an operator switches it."
    )
    min_export_agreement: Probability = Field(
        0.995, description="Least share of images on which an export must predict the same class as the model."
    )
    max_accuracy_drop: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05, description="Largest loss of held-out accuracy against the current release."
    )
    canary_images: PositiveInt = Field(
        64, description="Held-out images that a canary sends through the candidate and the current model."
    )
    min_canary_agreement: Probability = Field(
        0.9, description="Least share of canary images on which both models must predict the same class."
    )

    @model_validator(mode="after")
    def _served_variant_is_built(self) -> ReleaseConfig:
        if self.serve_variant not in self.variants:
            raise ValueError(f"serve_variant {self.serve_variant.value!r} must be one of variants")
        return self


class ServingConfig(Section):
    """The HTTP API and inference on Ray Serve."""

    host: str = Field(
        "127.0.0.1", description="Address that the API listens on; others than loopback need access.mode 'tokens'."
    )
    port: Port = Field(8000, description="Port of the API.")
    control_replicas: PositiveInt = Field(1, description="Replicas of the control API.")
    inference_min_replicas: PositiveInt = Field(1, description="Fewest inference replicas.")
    inference_max_replicas: PositiveInt = Field(2, description="Most inference replicas, under load.")
    poll_interval_s: PositiveFloat = Field(
        1.0, description="Seconds from one query of an inference replica for a new release to the next."
    )


class EdgeConfig(Section):
    """The edge processes started beside the system; a real vehicle runs ``fedvit-edge`` with the same options."""

    host: str = Field("127.0.0.1", description="Address that the edge processes listen on.")
    ports: tuple[Port, ...] = Field((8081, 8082), description="One edge process for each port; empty starts none.")
    poll_interval_s: PositiveFloat = Field(
        1.0, description="Seconds from one query of an edge process for a new release to the next."
    )

    @field_validator("ports")
    @classmethod
    def _ports_differ(cls, ports: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(ports)) != len(ports):
            raise ValueError("the same port appears twice")
        return ports


class FleetConfig(Section):
    """Liveness of vehicles and the exchange of messages with them."""

    heartbeat_interval_s: PositiveFloat = Field(
        60.0,
        description="Seconds from one heartbeat of a vehicle to the next. One replica on two cores serves 10,000 "
        "vehicles a minute.",
    )
    heartbeat_timeout_s: PositiveFloat = Field(
        150.0, description="Seconds after its last heartbeat for which a client counts as connected."
    )
    mailbox_url: str | None = Field(
        None,
        description="Path or fsspec URL where vehicles that cannot reach the API leave messages; null is the folder "
        "mailbox in home.",
    )
    check_interval_s: PositiveFloat = Field(
        5.0, description="Seconds from one count of the fleet, and collection of the mailbox, to the next."
    )
    task_interval_s: Annotated[float, Field(gt=0, le=MAX_INTERVAL_S)] = Field(
        5.0, description="Seconds from one query of a remote training client for a task to the next."
    )
    admission: Literal["operator", "automatic"] = Field(
        "operator",
        description="'operator': a vehicle that registers itself takes part once an operator has validated it, with at "
        "most the number of examples that the operator admits. 'automatic': every vehicle is believed.",
    )
    max_clients: PositiveInt = Field(
        20_000, description="Most remote clients; beyond it only an operator can register another one."
    )
    registrations_per_day: PositiveInt = Field(
        24, description="Most changes that a vehicle may make to its registration in a day (UTC)."
    )
    scrape_vehicles: bool = Field(
        False,
        description="Let Prometheus scrape the host:port that a vehicle registered as its capability 'metrics'. The "
        "vehicle chooses that address.",
    )

    @model_validator(mode="after")
    def _timeout_spans_an_interval(self) -> FleetConfig:
        if self.heartbeat_timeout_s <= self.heartbeat_interval_s:
            raise ValueError("heartbeat_timeout_s must be above heartbeat_interval_s")
        return self


class IncidentsConfig(Section):
    """The incident log."""

    reopen_within_s: PositiveFloat = Field(
        3600.0, description="Seconds after an incident's end within which the same alert reopens it."
    )
    contacts: dict[str, Annotated[str, Field(max_length=300)]] = Field(
        default_factory=dict,
        description="Whom to call, by role: name, telephone and e-mail as one text. See `fedvit incident contacts`.",
    )


class RemediationConfig(Section):
    """Runbook actions that the system may take by itself on an alert."""

    allow: tuple[RemediationAction, ...] = Field((), description="Actions that may be taken automatically.")
    cooldown_s: PositiveFloat = Field(900.0, description="Fewest seconds between two automatic runs of one action.")
    max_actions_per_hour: PositiveInt = Field(4, description="Most automatic actions of all kinds in an hour.")
    max_client_share: Probability = Field(
        0.1, description="Largest share of the active clients that an automatic action may leave out."
    )

    @field_validator("allow", mode="before")
    @classmethod
    def _may_be_automatic(cls, given: Any) -> Any:
        for name in given if isinstance(given, list | tuple) else ():
            if name in NEVER_AUTOMATIC:
                raise ValueError(f"{name!r} is never automatic: only a person may decide that")
            if name not in list(RemediationAction):
                raise ValueError(f"{str(name)[:100]!r} is no action; there are {', '.join(RemediationAction)}")
        return given


class OidcConfig(Section):
    """An OpenID Connect issuer whose JSON web tokens are accepted."""

    issuer: str = Field(description="Required value of the claim iss.")
    audience: str = Field(description="Required value of the claim aud.")
    jwks_path: Path | None = Field(None, description="File with the issuer's JSON Web Key Set.")
    jwks_url: str | None = Field(None, description="https URL of the issuer's JSON Web Key Set.")
    algorithm: Literal["RS256", "PS256", "ES256", "EdDSA"] = Field("RS256", description="Signature algorithm.")
    scope_claim: str = Field("scope", description="Claim that lists the scopes.")

    @model_validator(mode="after")
    def _one_source_of_keys(self) -> OidcConfig:
        if (self.jwks_path is None) == (self.jwks_url is None):
            raise ValueError("give either jwks_path or jwks_url")
        if self.jwks_url is not None and not self.jwks_url.startswith("https://"):
            raise ValueError("jwks_url must begin with https://")
        return self


class AccessConfig(Section):
    """Who may call the control API, and how often. Limits hold for each control replica."""

    mode: Literal["open_loopback", "tokens"] = Field(
        "open_loopback",
        description="'open_loopback' is the development mode: every caller on the loopback interface may do everything "
        "but reset the privacy budget and report a breach. 'tokens' requires one with every request.",
    )
    behind_tls_proxy: bool = Field(
        False, description="A reverse proxy ends TLS before the API; its X-Forwarded-For names the caller."
    )
    tls_cert: Path | None = Field(None, description="PEM file with the certificate of the API.")
    tls_key: Path | None = Field(None, description="PEM file with the key of that certificate.")
    oidc: OidcConfig | None = Field(None, description="OpenID Connect issuer; null accepts none.")
    requests_per_s: PositiveFloat = Field(50.0, description="Sustained requests a second of one caller.")
    burst: PositiveInt = Field(100, description="Requests that one caller may send at once.")
    max_failed_attempts: PositiveInt = Field(
        10, description="Failed authentications of one address within the window before it gets 429."
    )
    failed_attempts_window_s: PositiveFloat = Field(60.0, description="Length of that window, in seconds.")
    max_body_bytes: PositiveInt = Field(
        1_048_576, description="Largest request body, in bytes, where a route sets no limit of its own."
    )
    max_json_depth: PositiveInt = Field(
        32, description="Deepest nesting of a JSON request body; a deeper one is refused."
    )
    body_timeout_s: PositiveFloat = Field(300.0, description="Seconds that a request body may take to arrive.")
    min_body_bytes_per_s: PositiveFloat = Field(
        16_384.0,
        description="Bytes a second at which a request body must arrive on average, after its first ten seconds.",
    )
    max_requests_per_caller: PositiveInt = Field(
        8, description="Requests of one token that are worked on at once; a further one gets 429."
    )
    max_device_requests: PositiveInt = Field(
        32,
        description="Requests of all tokens with no scope but device, releases and alerts that are worked on at once; "
        "further ones wait for five seconds at most, and then get 503.",
    )
    max_operator_requests: PositiveInt = Field(
        32, description="The same for all other callers. Neither group can use what is reserved for the other."
    )
    max_body_bytes_per_caller: PositiveInt = Field(
        134_217_728, description="Bytes of request bodies of one token in memory at once; a further body gets 429."
    )
    max_device_body_bytes: PositiveInt = Field(
        536_870_912, description="Bytes of request bodies of all devices in memory at once; a further body gets 503."
    )
    request_timeout_s: PositiveFloat = Field(
        60.0, description="Seconds that a request may take after its body has arrived."
    )

    @model_validator(mode="after")
    def _certificate_and_key(self) -> AccessConfig:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        return self


class BackupConfig(Section):
    """Whom backups are encrypted to; by default to ``keys/backup.key`` of the state folder."""

    recipients: tuple[str, ...] = Field(
        (), description="Public age keys (age1...) that backups are encrypted to; the private ones are kept elsewhere."
    )
    passphrase_file: Path | None = Field(None, description="File with the passphrase that backups are encrypted with.")

    @field_validator("recipients")
    @classmethod
    def _are_age_keys(cls, recipients: tuple[str, ...]) -> tuple[str, ...]:
        for name in recipients:
            if not re.fullmatch("age1[0-9a-z]{58}", name):
                raise ValueError(f"{name[:100]!r} is no public key of age, which begins with age1")
        return recipients

    @model_validator(mode="after")
    def _one_kind_of_key(self) -> BackupConfig:
        if self.recipients and self.passphrase_file is not None:
            raise ValueError("give recipients or passphrase_file, not both")
        return self


class RayConfig(Section):
    """Placement of actors. CPUs are Ray's book-keeping; threads are what an actor computes with."""

    address: str | None = Field(
        None, description="Address of the Ray cluster to join; null takes RAY_ADDRESS, else starts one on this machine."
    )
    require_token: bool = Field(
        True, description="Refuse a Ray cluster that answers without its token. Anybody can run code on such a cluster."
    )
    proxies: PositiveInt = Field(2, description="ClientProxy actors that host the virtual clients.")
    threads_per_proxy: PositiveInt = Field(1, description="Torch threads of each ClientProxy.")
    actor_cpus: Annotated[float, Field(ge=0)] = Field(0.1, description="CPUs that each actor reserves in Ray.")
    start_timeout_s: PositiveFloat = Field(180.0, description="Seconds that all actors may take to start.")
    dashboard: bool = Field(True, description="Start Ray's dashboard, which also exports metrics.")

    def cluster_address(self) -> str | None:
        """The running cluster to join, by ``address`` or Ray's own ``RAY_ADDRESS``; None to start one here."""
        return self.address or os.environ.get("RAY_ADDRESS") or None
