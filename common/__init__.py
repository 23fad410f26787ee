"""The code that the four training scripts share; it imports no framework."""

__version__ = "1.0.0"
