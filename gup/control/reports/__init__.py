"""Reports: who took what, which clients wait for a restart, what was saved; counts and serves nothing."""
