"""The page for people: the control state as HTML, rendered once a second for all viewers.

Everything is rendered on the server and works without script; the script replaces changed sections and draws
the charts. Nothing comes from another host.
"""
