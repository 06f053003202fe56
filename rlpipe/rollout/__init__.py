"""Drawing trajectories: the decoder, the sampler, and the programs that join images and reflections."""
