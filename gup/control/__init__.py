"""The control plane: page, API, metrics, index, eviction. Clients never wait for it."""
