"""What breaks the protocol of secure aggregation is refused, on the side where it can be seen."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedvit.errors import ConfigError, SecureAggregationError, UpdateRejectedError
from fedvit.secagg import messages
from fedvit.secagg.client import SecureClient
from fedvit.secagg.parameters import Parameters, parameters_for
from fedvit.secagg.server import Phase
from fedvit.secagg.shamir import combine, random_secret, split
from tests.secure_site import BEFORE_SUM, parameters_of, site_of

ONE, TWO = "vehicle-000", "vehicle-001"


def test_a_key_signed_by_nobody_known_is_refused_on_both_sides() -> None:
    site = site_of(5)
    unregistered = SecureClient(site.parameters, ONE, Ed25519PrivateKey.generate(), site.peers)
    with pytest.raises(UpdateRejectedError):
        site.server.receive(ONE, unregistered.advertise())
    assert ONE in site.server.dropped
    invented = messages.encode("keys", {ONE: messages.decode(unregistered.advertise(), "keys", site.parameters)})
    with pytest.raises(SecureAggregationError):
        site.clients[TWO].share(invented)


def test_equal_keys_of_two_clients_are_refused() -> None:
    site = site_of(5)

    def entropy(size: int) -> bytes:
        return bytes([size]) * size

    twins = {c: SecureClient(site.parameters, c, site.identities[c], site.peers, entropy) for c in (ONE, TWO)}
    with pytest.raises(UpdateRejectedError):
        site.server.receive(ONE, twins[ONE].advertise())
    keys = {TWO: messages.decode(twins[TWO].advertise(), "keys", site.parameters)}
    with pytest.raises(SecureAggregationError):
        site.clients["vehicle-002"].share(messages.encode("keys", keys))


def test_a_client_that_answers_a_phase_in_two_ways_is_out() -> None:
    site = site_of(5)
    site.server.receive(ONE, site.clients[ONE].advertise())
    site.server.receive(ONE, site.clients[ONE].advertise())
    other = SecureClient(site.parameters, ONE, site.identities[ONE], site.peers)
    with pytest.raises(UpdateRejectedError):
        site.server.receive(ONE, other.advertise())
    assert ONE in site.server.dropped


@pytest.mark.parametrize(
    "vector",
    [np.zeros(15, np.uint32), np.zeros(16, np.int64), np.full(16, 2**20, np.uint32)],
    ids=["length", "type", "ring"],
)
def test_a_vector_of_another_length_or_ring_is_refused_on_both_sides(vector: np.ndarray) -> None:
    site = site_of(5)
    site.run(*BEFORE_SUM)
    with pytest.raises(UpdateRejectedError):
        site.server.receive_masked([ONE], vector)
    assert ONE in site.server.dropped
    with pytest.raises(SecureAggregationError):
        site.clients[TWO].mask(site.server.requests()[TWO], vector)


def test_a_wrong_share_is_found_and_the_others_rebuild_the_sum() -> None:
    site = site_of(6)
    site.run(*BEFORE_SUM, Phase.MASK, Phase.CONFIRM)
    for client_id, request in site.server.requests().items():
        answer = site.clients[client_id].unmask(request)
        if client_id == ONE:
            shares = messages.decode(answer, "shares", site.parameters)
            answer = messages.encode("shares", dict.fromkeys(shares, messages.written(b"\7" * 32)))
        site.server.receive(client_id, answer)
    site.server.advance()
    np.testing.assert_array_equal(site.server.total(), site.plain_sum())
    assert list(site.server.dropped) == [ONE]


def test_shares_that_do_not_combine_fail_closed() -> None:
    site = site_of(5)
    site.run(*BEFORE_SUM, Phase.MASK, Phase.CONFIRM)
    for client_id, request in site.server.requests().items():
        shares = messages.decode(site.clients[client_id].unmask(request), "shares", site.parameters)
        site.server.receive(client_id, messages.encode("shares", dict.fromkeys(shares, messages.written(b"\7" * 32))))
    with pytest.raises(SecureAggregationError):
        site.server.advance()
    assert site.server.phase is Phase.FAILED
    with pytest.raises(SecureAggregationError):
        site.server.total()


def test_a_second_set_of_survivors_is_not_confirmed() -> None:
    """It would let the server ask for both secrets of a client."""
    site = site_of(5)
    site.run(*BEFORE_SUM, Phase.MASK)
    client = site.clients[ONE]
    client.confirm(site.server.requests()[ONE])
    fewer = messages.survivors_to_json(site.parameters, site.server.survivors[:-1])
    with pytest.raises(SecureAggregationError):
        client.confirm(messages.encode("survivors", fewer))


def test_too_few_survivors_are_not_confirmed() -> None:
    site = site_of(5, min_survivors=3)
    site.run(*BEFORE_SUM, Phase.MASK)
    two = messages.survivors_to_json(site.parameters, [ONE, TWO])
    with pytest.raises(SecureAggregationError):
        site.clients[ONE].confirm(messages.encode("survivors", two))


def test_a_survivor_that_shared_nothing_is_not_confirmed() -> None:
    """The server would count it among those whose noise protects the sum."""
    site = site_of(5)
    site.exchange(Phase.ADVERTISE)
    site.exchange(Phase.SHARE, lambda client_id: client_id == TWO)
    site.exchange(Phase.MASK)
    everybody = messages.survivors_to_json(site.parameters, site.parameters.participants)
    with pytest.raises(SecureAggregationError):
        site.clients[ONE].confirm(messages.encode("survivors", everybody))


def test_a_participant_without_a_known_identity_is_refused() -> None:
    site = site_of(5)
    known = {c: key for c, key in site.peers.items() if c != TWO}
    with pytest.raises(SecureAggregationError):
        SecureClient(site.parameters, ONE, site.identities[ONE], known)


def test_a_client_masks_one_vector_of_a_session() -> None:
    site = site_of(5)
    site.run(*BEFORE_SUM)
    request, client = site.server.requests()[ONE], site.clients[ONE]
    first = client.mask(request, site.vectors[ONE])
    np.testing.assert_array_equal(client.mask(request, site.vectors[ONE]), first)
    with pytest.raises(SecureAggregationError):
        client.mask(request, site.vectors[TWO])


def test_a_client_continues_after_a_restart() -> None:
    site = site_of(5)
    for phase in (*BEFORE_SUM, Phase.MASK, Phase.CONFIRM, Phase.UNMASK):
        for client_id, client in site.clients.items():
            content = client.to_bytes()
            of = (site.parameters, client_id, site.identities[client_id], site.peers)
            site.clients[client_id] = SecureClient.from_bytes(content, *of)
        site.exchange(phase)
    np.testing.assert_array_equal(site.server.total(), site.plain_sum())


def test_two_sessions_share_no_key() -> None:
    one, other = site_of(5), site_of(5, session="cd" * 32)
    keys = [messages.decode(s.clients[ONE].advertise(), "keys", s.parameters) for s in (one, other)]
    assert not set(keys[0]) & set(keys[1])
    with pytest.raises(UpdateRejectedError):
        other.server.receive(ONE, one.clients[ONE].advertise())


@pytest.mark.parametrize("content", [b"", b"[]", b'{"keys": 1}', b'{"keys": {"a": 1}}', b"\xff" * 100, b"[" * 10**5])
def test_messages_that_are_none_are_refused(content: bytes) -> None:
    site = site_of(5)
    with pytest.raises(UpdateRejectedError):
        site.server.receive(ONE, content)
    with pytest.raises(UpdateRejectedError):
        site.clients[TWO].share(content)


def test_the_threshold_leaves_no_room_for_two_sets() -> None:
    """Not even with the help of all who may collude."""
    for count, colluding in ((3, 0), (5, 1), (30, 3), (100, 5), (1_000, 20)):
        parameters = parameters_of(count, max_colluding=colluding, dropout_rate=0.1, min_survivors=2)
        assert 2 * parameters.threshold > parameters.neighbours + 1 + colluding * (parameters.neighbours == count - 1)
        assert all(
            c in parameters.neighbours_of(n) for c in parameters.participants for n in parameters.neighbours_of(c)
        )
    assert parameters.neighbours < 200


def test_parameters_without_a_threshold_are_refused() -> None:
    with pytest.raises(ConfigError):
        parameters_of(5, max_colluding=4)
    with pytest.raises(ConfigError):
        parameters_for("ab" * 32, ["a"], min_survivors=2, max_colluding=0, dropout_rate=0.3, bits=8, length=1)


def test_parameters_survive_their_json_and_nothing_else_does() -> None:
    parameters = parameters_of(7)
    assert Parameters.from_json(parameters.to_json()) == parameters
    for wrong in ("{}", "[]", parameters.to_json().replace('"bits":20', '"bits":99')):
        with pytest.raises(ValueError, match=r".+"):
            Parameters.from_json(wrong)


def test_fewer_shares_than_the_threshold_give_another_secret() -> None:
    secret = random_secret()
    shares = split(secret, 3, [1, 2, 5, 9])
    assert combine({place: shares[place] for place in (2, 5, 9)}) == secret
    assert combine({place: shares[place] for place in (2, 5)}) != secret
