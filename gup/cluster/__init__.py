"""Several gups as one cache: who asks whom, and how the WAN's rate is shared."""
