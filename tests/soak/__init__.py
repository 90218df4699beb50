"""Everything at once, for as long as one likes, against a model of what is right: `make soak MINUTES=30`."""
