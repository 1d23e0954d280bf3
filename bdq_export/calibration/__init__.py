"""What a model sees: calibration tokens, one block at a time, and the statistics of every linear's inputs."""
