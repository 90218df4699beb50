"""Load tests: many simulated clients against one gup, by locust."""
