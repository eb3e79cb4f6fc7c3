"""StateVLA: a Mamba encoder over all modalities and a flow-matching action head."""
