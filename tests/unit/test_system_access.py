"""What a starting system does about tokens and TLS, without starting one."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from ray.serve.config import HTTPOptions

from fedvit.access.identity import Scope
from fedvit.access.tokens import verify_token
from fedvit.errors import ConfigError, UnauthorizedError
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.types import utc_now
from serve_apps.startup.serving import edge_environment, follower_token, http_options
from serve_apps.system import QUIET_TUNE, RaySystem


def test_a_system_that_strangers_could_use_is_not_started(tmp_path: Path) -> None:
    settings = load_settings(environ={}, overrides={"home": tmp_path / "home", "serving": {"host": "0.0.0.0"}})
    starting = RaySystem(settings).running(lambda _: None, lambda: None)
    with pytest.raises(ConfigError), starting:
        pytest.fail("started")
    assert not (tmp_path / "home").exists()


def test_followers_get_a_token_for_as_long_as_the_system_lives(tmp_path: Path) -> None:
    settings = load_settings(environ={}, overrides={"home": tmp_path, "access": {"mode": "tokens"}})
    with Store.open(tmp_path) as store, follower_token(settings) as path:
        assert path is not None
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        killed = path.read_text()
        with follower_token(settings) as again:  # As if the first had been killed.
            assert again is not None
            text = again.read_text()
            assert verify_token(store, text, utc_now()).scopes == {Scope.RELEASES}
            with pytest.raises(UnauthorizedError) as revoked:
                verify_token(store, killed, utc_now())
            assert revoked.value.details["reason"] == "revoked"
        assert not again.exists()
        with pytest.raises(UnauthorizedError) as revoked:
            verify_token(store, text, utc_now())
        assert revoked.value.details["reason"] == "revoked"


def test_in_the_open_mode_there_is_no_token(tmp_path: Path) -> None:
    with follower_token(load_settings(environ={}, overrides={"home": tmp_path})) as path:
        assert path is None
    assert list(tmp_path.iterdir()) == []


def test_serve_understands_how_it_shall_listen(tmp_path: Path) -> None:
    plain = load_settings(environ={})
    assert http_options(plain) == {"host": "127.0.0.1", "port": 8000, "request_timeout_s": 390.0}
    files = {"tls_cert": tmp_path / "c.pem", "tls_key": tmp_path / "k.pem"}
    for path in files.values():
        path.write_text("")
    options = HTTPOptions(**http_options(load_settings(environ={}, overrides={"access": files})))
    assert (options.ssl_certfile, options.ssl_keyfile) == (str(tmp_path / "c.pem"), str(tmp_path / "k.pem"))


def test_an_edge_counts_for_itself() -> None:
    ours = {"PATH": "/bin", "PROMETHEUS_MULTIPROC_DIR": "/var/metrics"}
    assert edge_environment(ours) == {"PATH": "/bin"}


def test_ray_tune_prints_no_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune.experimental.output import get_air_verbosity

    for name, value in QUIET_TUNE.items():
        monkeypatch.setenv(name, value)
    assert get_air_verbosity(0) is None
