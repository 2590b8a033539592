"""Published mixtures of Open X-Embodiment datasets, under their published names.

MULTIPLIERS scale the number of steps of a dataset; SHARES are fractions of the examples.
Sources: Octo (magic_soup, rtx, rtx_franka, flex_soup), OpenVLA (magic_soup_plus), and the shares
that Re-Mix learned in 200,000 steps (rtx_remix, without the unpublished taco_extra, 0.7 %).
"""

from __future__ import annotations

from octolike.data.specs.oxe import OXE

_SOUP = {
    "fractal20220817_data": 0.54087122203,
    "kuka": 0.8341046294,
    "bridge_dataset": 1.0,
    "taco_play": 2.0,
    "jaco_play": 1.0,
    "berkeley_cable_routing": 1.0,
    "roboturk": 2.0,
    "nyu_door_opening_surprising_effectiveness": 1.0,
    "viola": 2.0,
    "berkeley_autolab_ur5": 2.0,
    "toto": 1.0,
    "language_table": 0.1,
    "stanford_hydra_dataset_converted_externally_to_rlds": 2.0,
    "austin_buds_dataset_converted_externally_to_rlds": 1.0,
    "nyu_franka_play_dataset_converted_externally_to_rlds": 3.0,
    "furniture_bench_dataset_converted_externally_to_rlds": 0.1,
    "ucsd_kitchen_dataset_converted_externally_to_rlds": 2.0,
    "austin_sailor_dataset_converted_externally_to_rlds": 1.0,
    "austin_sirius_dataset_converted_externally_to_rlds": 1.0,
    "bc_z": 0.2,
    "dlr_edan_shared_control_converted_externally_to_rlds": 1.0,
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": 1.0,
    "utaustin_mutex": 1.0,
    "berkeley_fanuc_manipulation": 2.0,
    "cmu_stretch": 1.0,
}
_RTX = {
    "fractal20220817_data": 0.54087122203,
    "kuka": 0.8341046294,
    "bridge_dataset": 1.0,
    "taco_play": 2.0,
    "jaco_play": 2.0,
    "berkeley_cable_routing": 3.0,
    "roboturk": 1.0,
    "nyu_door_opening_surprising_effectiveness": 5.0,
    "viola": 2.0,
    "berkeley_autolab_ur5": 1.0,
    "toto": 1.0,
}
_FRANKA = {
    "stanford_hydra_dataset_converted_externally_to_rlds": 1.0,
    "austin_buds_dataset_converted_externally_to_rlds": 3.0,
    "nyu_franka_play_dataset_converted_externally_to_rlds": 3.0,
    "maniskill_dataset_converted_externally_to_rlds": 0.1,
    "furniture_bench_dataset_converted_externally_to_rlds": 0.1,
    "cmu_franka_exploration_dataset_converted_externally_to_rlds": 5.0,
    "austin_sailor_dataset_converted_externally_to_rlds": 1.0,
    "austin_sirius_dataset_converted_externally_to_rlds": 1.0,
    "berkeley_rpt_converted_externally_to_rlds": 1.0,
    "kaist_nonprehensile_converted_externally_to_rlds": 3.0,
    "stanford_robocook_converted_externally_to_rlds": 1.0,
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": 1.0,
    "utaustin_mutex": 1.0,
    "cmu_play_fusion": 1.0,
}
_FLEXIBLE = {
    "berkeley_mvp_converted_externally_to_rlds": 1.0,
    "gnm_dataset": 1.0,
    "aloha_static_dataset": 3.0,
    "aloha_mobile_dataset": 2.0,
    "dobbe": 1.0,
    "roboset": 0.5,
    "rh20t": 0.5,
}
# OpenVLA reads a third-person camera, and excludes this dataset: it has only a wrist camera.
_THIRD_PERSON = {k: w for k, w in _SOUP.items() if k != "nyu_door_opening_surprising_effectiveness"}

MULTIPLIERS: dict[str, dict[str, float]] = {
    "bridge": {"bridge_dataset": 1.0},
    "bridge_and_fractal": {"bridge_dataset": 1.0, "fractal20220817_data": 1.0},
    "magic_soup": _SOUP,
    "magic_soup_plus": _THIRD_PERSON | {"fmb_dataset": 1.0, "dobbe": 0.2, "droid": 0.06},
    "flex_soup": _SOUP | _FLEXIBLE,
    "rtx": _RTX,
    "rtx_franka": _RTX | _FRANKA,
    "libero": {spec.name: 1.0 for spec in OXE if spec.name.startswith("libero_")},
    # bridge_orig and bridge_oxe are Bridge too: in another folder, and in an older version.
    "all": {spec.name: 1.0 for spec in OXE if spec.name not in ("bridge_orig", "bridge_oxe")},
}
SHARES: dict[str, dict[str, float]] = {
    "rtx_remix": {
        "fractal20220817_data": 0.45421281456947327,
        "bridge_dataset": 0.19114349782466888,
        "kuka": 0.1237783432006836,
        "toto": 0.12147394567728043,
        "taco_play": 0.04522952809929848,
        "viola": 0.01989024691283703,
        "berkeley_autolab_ur5": 0.019247833639383316,
        "roboturk": 0.011293914169073105,
        "jaco_play": 0.004058686085045338,
        "berkeley_cable_routing": 0.002363319508731365,
    },
}
