"""What is trained, and on what: the network and its base, the diffusion, the method, the device."""
