"""Recordings in other formats to an RLDS dataset: HDF5 (ALOHA, robomimic), LeRobot, npz."""
