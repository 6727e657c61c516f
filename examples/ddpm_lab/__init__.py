"""The parts of `examples/ddpm.py`, a driver that fine-tunes MONAI's 3D diffusion U-Net.

Each wing imports only what stands to its left:

    support <- config <- data <- model <- sampling <- evaluation <- training <- study <- searching
"""
