"""Stands for a matplotlib that is not installed: drawing takes a second, and few tests look at a picture."""

raise ImportError("No module named 'matplotlib'")
