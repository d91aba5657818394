"""Communication, events, logging, file access and random seeds."""
