"""The cache: store, claims, bodies and fills, without a database."""
