"""Experiments of the papers at a size that runs in minutes: data and recipes, the engine that runs them, the table."""
