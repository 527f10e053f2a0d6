"""The diffusion: noise levels, denoisers, both processes, their paths, and the flow."""
