"""The control plane: page, API, metrics, index, eviction. Never in a client's way."""
