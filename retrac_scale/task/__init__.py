"""One timestep of training on one sample, as a loss to differentiate."""
