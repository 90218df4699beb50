"""Bytes kept once: store, claims, bodies, fills. The data plane's half; never a database."""
