"""A simulator of SageMaker's Managed Spot Training: `python -m spot --help`."""
