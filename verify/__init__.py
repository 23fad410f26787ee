"""Verify that a training script, modified or not, resumes bit-identically."""
