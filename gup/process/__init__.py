"""Processes: supervisor, workers, controller and what they share."""
