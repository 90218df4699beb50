"""The page for people: the control state as HTML, once a second for all who look.

Everything is rendered here, whole without script; the script puts fresh sections in the place of old ones and
draws the charts. Nothing comes from another host.
"""
