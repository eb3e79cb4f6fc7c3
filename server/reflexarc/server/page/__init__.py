"""The status page at ``GET /``: what the server does now, what its sessions last saw and did."""
