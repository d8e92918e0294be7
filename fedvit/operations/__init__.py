"""Long operations of a running system: the runner, edge optimisation, the mailbox, periodic tasks."""
