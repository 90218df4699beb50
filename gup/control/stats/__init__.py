"""Statistics over time: clients, savings, history; one SQLite database."""
