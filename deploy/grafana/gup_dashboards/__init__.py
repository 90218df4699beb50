"""Grafana's dashboards as code: defined here, generated into ../dashboards."""
