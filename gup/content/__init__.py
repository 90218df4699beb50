"""Content: keys, routes, catalogues, releases, delivery rules. Pure functions and values, without I/O."""
