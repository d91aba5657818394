"""Weights in other projects' layouts, converted to this project's names and shapes."""
