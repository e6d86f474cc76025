"What signals add: a config is predicted from other configs alone."
import numpy as np
import pandas as pd

from llprobe.ablation import STEPS, held_out


def test_a_config_is_predicted_without_its_own_targets_of_any_seed():
    "When all its targets change, what is predicted for it does not, and what is predicted for others does"
    rng = np.random.default_rng(0)
    configs = pd.DataFrame(rng.random((12, 4)), columns=['hp_a', 'hp_b', 'curve_c', 'val_score']).assign(config_id=[f'c{i}' for i in range(12)], target=rng.random(12))
    frame = pd.concat([configs.assign(seed=seed, response_d=rng.random(12)) for seed in range(3)], ignore_index=True)
    before = held_out(frame, STEPS['+ responses'], n_folds=3)
    for config in ('c0', 'c5'):
        own = frame['config_id'] == config
        after = held_out(frame.assign(target=frame['target']+10*own), STEPS['+ responses'], n_folds=3)
        assert (after[own] == before[own]).all() and (after[~own] > before[~own]+0.1).any()
