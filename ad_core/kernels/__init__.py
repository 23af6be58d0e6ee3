"""What kernels of several plugins share, public to plugins. It imports `ad_core.api`, torch and numpy, and nothing else."""
