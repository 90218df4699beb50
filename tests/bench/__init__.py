"""Measurements side by side with nginx and Varnish: `make bench`. What a test can hold is in the suite."""
