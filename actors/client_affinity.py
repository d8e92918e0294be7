"""Assignment of clients to proxies: to the proxy that has a client's data in memory, with an equal load for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

REMEMBERED = 100_000


class ClientAffinity:
    """Remembers which proxy trained each of the last :data:`REMEMBERED` clients.

    The assignment affects only speed: a client's update is the same on every proxy.

    Args:
        proxies: how many proxies there are.
        remembered: how many clients are remembered, at least.
    """

    def __init__(self, proxies: int, remembered: int = REMEMBERED) -> None:
        self._proxies, self._remembered = proxies, remembered
        self._proxy_of: dict[str, int] = {}

    def assign(self, client_ids: Sequence[str], load: Mapping[int, int]) -> dict[int, list[str]]:
        """The clients that each proxy shall train, by proxy.

        Args:
            load: how many clients each proxy is still training; it is assigned so many fewer.
        """
        share = -(-(len(client_ids) + sum(load.values())) // self._proxies)
        room = {index: share - load.get(index, 0) for index in range(self._proxies)}
        groups: dict[int, list[str]] = {index: [] for index in room}
        unassigned = []
        for client_id in client_ids:
            last = self._proxy_of.get(client_id)
            if last is None or len(groups[last]) >= room[last]:
                unassigned.append(client_id)
            else:
                groups[last].append(client_id)
        for client_id in unassigned:
            index = max(room, key=lambda index: room[index] - len(groups[index]))
            groups[index].append(client_id)
            self._proxy_of[client_id] = index
        for client_id in list(self._proxy_of)[: -max(self._remembered, len(client_ids))]:
            del self._proxy_of[client_id]
        return {index: group for index, group in groups.items() if group}

    def at(self, proxies: Sequence[int]) -> frozenset[str]:
        """The clients that were last trained on these proxies."""
        # A copy: another thread may assign clients meanwhile.
        return frozenset(client_id for client_id, index in self._proxy_of.copy().items() if index in proxies)
