"""What is remembered over time: clients, savings, history; one SQLite database."""
