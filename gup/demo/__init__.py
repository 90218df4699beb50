"""The demo: a simulated management server and simulated clients, around a real gup."""
