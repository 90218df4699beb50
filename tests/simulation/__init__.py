"""A day of a large site on paper: clients, nodes and links as figures, with gup's own code of ownership.

`make simulation` prints the table of docs/cluster.md. No socket and no clock: the same seed, the same table.
"""
