"""What the four training scripts share: nothing here imports a framework."""

__version__ = "1.0.0"
