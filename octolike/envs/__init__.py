"""Simulators behind the gymnasium protocol; each is imported only when it is used."""
