"""Proves that a training script, changed or not, resumes with the same bits."""
