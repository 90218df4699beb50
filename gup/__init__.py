"""gup, a Group Update Provider: fetches each file over the WAN once and serves it to a whole site."""

__version__ = "0.1.0"
