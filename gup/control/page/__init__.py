"""The page for people: what the plane knows, as HTML, once a second for all who look. Counts nothing itself.

Everything is rendered here, whole without script; the script puts fresh sections in the place of old ones and
draws the charts. Nothing comes from another host.
"""
