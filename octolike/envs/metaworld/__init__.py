"""Meta-World: fifty tasks of one Sawyer arm, with one camera and language instructions.

`metaworld_env` is the environment, `metaworld_expert` records demonstrations; both need the package
metaworld. `metaworld_tasks` lists the tasks and needs no simulator.
"""
