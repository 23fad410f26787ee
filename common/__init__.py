"""What the four training scripts share: nothing here imports a framework."""
