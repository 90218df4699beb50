"""Grafana's dashboards as code: what they show stands here, ../dashboards holds what is built from it."""
