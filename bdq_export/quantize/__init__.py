"""Weights to codes and scales: round to nearest, searched grids, GPTQ and its refinement."""
