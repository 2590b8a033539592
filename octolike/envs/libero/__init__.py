"""LIBERO: 130 language-conditioned tasks on a Panda arm, and LIBERO-PRO's variants of 40.

The names of tasks (`libero_tasks`) can be imported without any simulator.
"""
