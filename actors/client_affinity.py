"""Which proxy trains which client: the one where the client's data is warm, as long as all have as much to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

REMEMBERED = 100_000


class ClientAffinity:
    """Remembers the last :data:`REMEMBERED` clients or so; where one is trained changes no bit of what comes of it.

    Args:
        proxies: how many there are.
    """

    def __init__(self, proxies: int) -> None:
        self._proxies = proxies
        self._home: dict[str, int] = {}

    def assign(self, client_ids: Sequence[str], load: Mapping[int, int]) -> dict[int, list[str]]:
        """Deal the clients out, by proxy.

        Args:
            load: how many clients each proxy still has to answer for; it is given so many fewer.
        """
        share = -(-(len(client_ids) + sum(load.values())) // self._proxies)
        room = {index: share - load.get(index, 0) for index in range(self._proxies)}
        groups: dict[int, list[str]] = {index: [] for index in room}
        homeless = []
        for client_id in client_ids:
            home = self._home.get(client_id)
            if home is None or len(groups[home]) >= room[home]:
                homeless.append(client_id)
            else:
                groups[home].append(client_id)
        for client_id in homeless:
            index = max(room, key=lambda index: room[index] - len(groups[index]))
            groups[index].append(client_id)
            self._home[client_id] = index
        self._forget(len(client_ids))
        return {index: group for index, group in groups.items() if group}

    def at(self, proxies: Sequence[int]) -> frozenset[str]:
        """The clients that were last trained on these proxies."""
        # Copied at once: a round that is dealt out meanwhile adds to it.
        return frozenset(client_id for client_id, index in self._home.copy().items() if index in proxies)

    def _forget(self, just_dealt: int) -> None:
        for client_id in list(self._home)[: max(0, len(self._home) - max(REMEMBERED, just_dealt))]:
            del self._home[client_id]
