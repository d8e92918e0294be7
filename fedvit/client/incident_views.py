"""What the control API answers about incidents."""

from __future__ import annotations

from fedvit.client.views import View


class ReceivedView(View):
    """The incidents that a message concerned."""

    incidents: tuple[str, ...]
