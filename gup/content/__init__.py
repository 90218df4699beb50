"""What is asked for: keys, routes, catalogue, releases, rules. Pure: never any I/O."""
