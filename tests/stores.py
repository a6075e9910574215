"""A store that tells what it was asked for."""


class WatchedStore:
    """Passes on and notes the requests of a store. It has no `wait`, of which each timeout is a warning on the console."""

    def __init__(self, store):
        self.store, self.requests = store, []

    def __getattr__(self, name):
        assert name != "wait", "a wait with a timeout prints a warning each time it expires"
        self.requests.append(name)
        return getattr(self.store, name)
