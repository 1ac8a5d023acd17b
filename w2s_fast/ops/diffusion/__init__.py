"""Operations of diffusion models: modulation, samplers, consistency training."""
