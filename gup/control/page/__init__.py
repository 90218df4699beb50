"""The page for people: the control state as HTML, rendered once a second for all viewers.

Everything is rendered on the server, complete without script; the script replaces sections that changed and
draws the charts. Nothing comes from another host.
"""
