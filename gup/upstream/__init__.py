"""The way out: choice of upstream, resumable downloads, the WAN's rate."""
