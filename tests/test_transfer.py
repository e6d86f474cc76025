"The transfer model bears strange files and frames, and misleading tasks."
import pickle
import zipfile

import numpy as np
import pandas as pd
import pytest
import skops.io
from sklearn.linear_model import LinearRegression

from llprobe.core import InputError
from llprobe.transfer import TransferModel


def task(name: str, seed: int, n_configs: int = 12) -> pd.DataFrame:
    "A task whose steep configs are flattered at low levels"
    draw = np.random.default_rng(seed)
    steep = draw.uniform(size=n_configs)
    full = draw.uniform(-2, -1)-0.5*steep+0.1*draw.normal(size=n_configs)
    rows = [pd.DataFrame(dict(task=name, config_id=[f'{name} {i}' for i in range(n_configs)], level=level, status='ok', hp_steep=steep,
                              val_score=1-np.exp(full-(0.1+0.4*steep)*np.log(level)), target=1-np.exp(full))) for level in (0.1, 0.2)]
    return pd.concat(rows, ignore_index=True)


OTHERS = pd.concat([task(f'task {i}', i) for i in range(8)], ignore_index=True)
NEW = task('new', 100)


@pytest.fixture(scope='module')
def model() -> TransferModel:
    return TransferModel(n_trees=10).fit(OTHERS)


def test_it_learns(model):
    assert model.trust > 0 and model.gain[0] > 0


def test_saved_and_loaded_predicts_the_same(model, tmp_path):
    model.save(tmp_path/'model.skops')
    pd.testing.assert_frame_equal(TransferModel.load(tmp_path/'model.skops').predict(NEW), model.predict(NEW))
    with zipfile.ZipFile(tmp_path/'model.skops') as file:
        assert {entry.compress_type for entry in file.infolist()} == {zipfile.ZIP_DEFLATED}


class Foreign:
    "A type on nobody's list"


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path/'file'
    for write in (lambda: path.write_bytes(pickle.dumps(Foreign())), lambda: skops.io.dump(Foreign(), path), lambda: skops.io.dump(LinearRegression(), path),
                  lambda: skops.io.dump({'format': 'llprobe.TransferModel'}, path), lambda: path.unlink()):
        write()
        with pytest.raises(InputError, match='no model that llprobe saved'):
            TransferModel.load(path)


def test_another_scikit_learn_is_refused(model, tmp_path, monkeypatch):
    model.save(tmp_path/'model.skops')
    monkeypatch.setattr('sklearn.__version__', '0.1')
    with pytest.raises(InputError, match='this is 0.1'):
        TransferModel.load(tmp_path/'model.skops')


def test_a_tree_that_runs_in_a_circle_is_refused(tmp_path):
    fitted = TransferModel(n_trees=3).fit(OTHERS)
    tree = fitted.regressors[0][-1].estimators_[0].tree_
    tree.children_left[0] = 0
    fitted.save(tmp_path/'model.skops')
    with pytest.raises(InputError, match='no model that llprobe saved'):
        TransferModel.load(tmp_path/'model.skops')


def test_the_record_of_configs_that_recur_is_used():
    "Nothing but its name tells that a config gains from more data"
    draw = np.random.default_rng(0)
    gains = draw.uniform(size=12)
    def recurring(name: str) -> pd.DataFrame:
        probed = draw.uniform(-2, -1.5, size=12)
        return pd.DataFrame(dict(task=name, config_id=[f'c{i}' for i in range(12)], level=0.1, val_score=1-np.exp(probed), target=1-np.exp(probed-gains)))
    new, fitted = recurring('new'), TransferModel(n_trees=30).fit(pd.concat([recurring(f'task {i}') for i in range(20)], ignore_index=True))
    predicted, target = fitted.predict(new).preference.droplevel('task'), new.set_index('config_id').target
    assert fitted.trust and predicted.corr(target, 'spearman') > 0.85 > 0.7 > new.val_score.corr(new.target, 'spearman')


def test_misleading_tasks_leave_the_probes_order():
    draw = np.random.default_rng(0)
    misleading = OTHERS.copy()
    for _, rows in OTHERS.groupby('task'):
        misleading.loc[rows.index, 'target'] = np.tile(draw.permutation(rows.target.to_numpy()[:12]), 2)
    predicted = TransferModel(n_trees=10).fit(misleading).predict(NEW)
    probed = NEW[NEW.level == 0.2].set_index('config_id').val_score
    assert predicted.preference.droplevel('task').corr(probed, 'spearman') == pytest.approx(1)


def test_a_single_task_keeps_the_probes_order():
    fitted = TransferModel(n_trees=10).fit(task('only', 1))
    predicted = fitted.predict(NEW)
    assert fitted.trust == 0 and np.isfinite(predicted.to_numpy()).all()


def test_the_order_of_rows_is_irrelevant(model):
    shuffled = TransferModel(n_trees=10).fit(OTHERS.sample(frac=1, random_state=0)).predict(NEW.sample(frac=1, random_state=1))
    pd.testing.assert_frame_equal(shuffled, model.predict(NEW))


def test_useless_columns_are_harmless():
    extra = dict(curve_constant=1.0, response_missing=np.nan, data_infinite=np.inf)
    fitted = TransferModel(n_trees=10).fit(OTHERS.assign(**extra))
    for frame in (NEW.assign(**extra), NEW, NEW.assign(curve_unknown=3.0)):
        assert np.isfinite(fitted.predict(frame).to_numpy()).all()


def test_a_diverged_probe_is_put_behind_the_best(model):
    best = model.predict(NEW).preference.idxmax()[1]
    failed = NEW.assign(status=np.where(NEW.config_id == best, 'diverged', 'ok'), val_score=NEW.val_score.where(NEW.config_id != best))
    predicted = model.predict(failed).preference.droplevel('task')
    assert predicted[best] < predicted.max()


def test_intervals_contain_their_mean_and_most_targets(model):
    unseen = pd.concat([task(f'unseen {i}', 200+i) for i in range(20)], ignore_index=True)
    predicted = model.predict(unseen)
    assert ((predicted.lower <= predicted['mean']) & (predicted['mean'] <= predicted.upper)).all()
    reached = unseen.groupby(['task', 'config_id']).target.first()[predicted.index]
    assert reached.between(predicted.lower, predicted.upper).mean() > 0.85
