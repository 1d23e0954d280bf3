"""From a lowered graph to an output folder that is there whole or not at all."""
