"""Language-vision states and compressed 3D geometry in the layers of a diffusion transformer."""
