"""What was moved, by the minute for a day and by the hour for ninety days. Reads counters; never counts."""
