"""Meta-World: fifty tasks of one Sawyer arm, from one camera and language.

`env` is the environment, `expert` its demonstrations; both need the package metaworld. `tasks` says
what there is to do, and needs nothing.
"""
