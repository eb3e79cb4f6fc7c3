"""Ask a served policy for action chunks and execute them. No torch, no simulator."""
