"""Operations of diffusion models in plain PyTorch."""
