"""What the scripts promise about speed, measured: `make bench`."""
