"""Command lines; run them as ``python tools/<name>.py`` from a clone."""
