"""Convert recordings to an RLDS dataset: HDF5 (ALOHA, robomimic), LeRobot, npz."""
