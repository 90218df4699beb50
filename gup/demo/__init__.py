"""A simulated management server and simulated clients. Talks HTTP only."""
