"""Episodes of a mobile robot, one HDF5 file each: reading, writing, inspection."""
