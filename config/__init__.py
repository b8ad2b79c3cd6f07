"""Makes this folder a package, so that `from config.muon_cpu import *` in a recipe always finds the
file of this folder, whatever else is called config on Python's path."""
