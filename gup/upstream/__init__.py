"""Connections to upstreams: which one is asked, resumable downloads, the WAN rate limit."""
