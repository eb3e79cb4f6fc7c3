"""A small mobile world of our own: a wheeled base, four coloured targets, obstacles on the way."""
