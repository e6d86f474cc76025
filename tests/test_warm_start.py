"Warm starts from outside: what good and bad sources do to a search, real studies, resumption without the sources, refusals."
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llprobe.adaptive import make_ladder, maximise
from llprobe.core import InputError
from llprobe.probe import ProbeSettings
from llprobe.space import SearchSpace, config_id
from llprobe.store import open_store
from llprobe.study import StudySettings, open_study, run_probes, run_study
from llprobe.training import TrainSettings
from llprobe.warm_start import source_predictions

SPACE = SearchSpace('mlp', dict(learning_rate=dict(low=1e-3, high=1, log=True), dropout=dict(low=0, high=0.5), weight_decay=dict(low=1e-5, high=1e-2, log=True),
                                momentum=dict(low=0.1, high=0.9), label_smoothing=dict(low=0, high=0.3)))
POOL = SPACE.sample(400, seed=0)
OPTIMUM = np.array([0.2, 0.9, 0.4, 0.8, 0.15])  # columns as encoded
SMALL = StudySettings(levels=(0.1, 0.3), n_configs=6, probe=ProbeSettings(train=TrainSettings(n_epochs=2)))
BUDGET = replace(SMALL, budget=2.5, pool=48)


def quality(configs: list[dict]) -> np.ndarray:
    return 0.9-0.6*((SPACE.encode(configs)-OPTIMUM)**2).sum(1)


def records(sign: int, seed: int) -> list[dict]:
    "A study that saw 40 configs at two levels, the right way round or upside down"
    noise = np.random.default_rng(seed)
    rows = []
    for config in SPACE.sample(40, seed=seed+100):
        for level in (0.1, 0.3):
            score = sign*quality([config])[0]-0.1*(1-level)+0.01*noise.standard_normal()
            rows.append(dict(config_id=config_id(config), config=config, level=level, purpose='probe', status='ok', val_score=score))
    return rows


def test_a_source_with_the_same_truth_puts_its_best_first():
    predicted = source_predictions(records(1, 0), SPACE, POOL)
    assert np.corrcoef(predicted, quality(POOL))[0, 1] > 0.95
    assert np.argsort(np.argsort(-quality(POOL)))[np.argmax(predicted)] < 8
    wrong = source_predictions(records(-1, 0), SPACE, POOL)
    assert np.corrcoef(wrong, quality(POOL))[0, 1] < -0.9


def regret(sign: int|None, seed: int, budget: float) -> float:
    "How far the best config of a search in full is from the best of the pool"
    noise, truth = np.random.default_rng(seed), quality(POOL)
    def function(config, level, epochs): return truth[POOL.index(config)]-0.1*(1-level)+0.01*noise.standard_normal()
    sources = None if sign is None else source_predictions(records(sign, seed), SPACE, POOL)[None]
    history = maximise(function, POOL, SPACE.encode(POOL), make_ladder((0.1, 0.3, 1.0), (1,)), budget, seed=seed, sources=sources)
    return float(truth.max()-truth[history[history['level'] == 1].candidate].max())


def test_a_good_source_helps_and_a_misleading_one_does_no_lasting_harm():
    "Cold, right and wrong reached 0.067, 0.006 and 0.199 below the best within 2.5 full trainings, and 0.015, 0.009 and 0.012 within 5"
    def mean(sign, budget): return np.mean([regret(sign, seed, budget) for seed in range(5)])
    assert mean(1, 2.5) < mean(None, 2.5)/2
    assert mean(-1, 5) < mean(None, 5)+0.02


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('source')/'digits'
    run_probes('digits', out, settings=replace(SMALL, seed=1), n_workers=1, progress=False)
    return out


@pytest.mark.parametrize('settings', [SMALL, BUDGET], ids=['levels', 'budget'])
def test_a_study_resumes_without_its_source(settings, source, tmp_path):
    sources = tmp_path/'sources'
    shutil.copytree(source, sources/'digits')
    warm = replace(settings, warm_start=(sources/'digits',))
    first = run_study('digits', tmp_path/'whole', settings=warm, n_workers=1, progress=False)
    open_study('digits', tmp_path/'begun', settings=warm, progress=False).store.close()
    assert str(tmp_path) not in json.dumps(first['settings']) + (tmp_path/'whole'/'warm-start.json').read_text()
    [named] = first['settings']['warm_start']
    with open_store(source/'study.db', read_only=True) as store:
        assert named == dict(dataset='digits', fingerprint=store.study('digits')['fingerprint'], settings=store.study('digits')['settings_digest'])
    shutil.rmtree(sources)
    again = run_study('digits', tmp_path/'begun', settings=warm, n_workers=1, progress=False)
    assert again['predictions'] == first['predictions'] and again['best_config_id'] == first['best_config_id']
    cold = [config_id(c) for c in open_study('digits', tmp_path/'cold', settings=settings, progress=False).search.configs.values()]
    tried = {p['config_id'] for p in first['predictions']}
    assert tried-set(cold) if settings.budget is None else tried != set(cold[:len(tried)]), 'the source had no say'


def test_a_study_of_another_architecture_is_a_source(source, tmp_path):
    study = open_study('wine', tmp_path/'wine', settings=replace(SMALL, warm_start=(source,)), progress=False)
    study.store.close()
    kept = json.loads((tmp_path/'wine'/'warm-start.json').read_text())
    assert study.search.space.architecture == 'mlp' and kept['sources'][0]['dataset'] == 'digits'
    assert len(kept['predictions'][0]) == len(kept['candidates']) and np.ptp(kept['predictions'][0]) > 0


def test_a_source_that_grew_changes_nothing(source, tmp_path):
    shutil.copytree(source, tmp_path/'source')
    warm = replace(SMALL, warm_start=(tmp_path/'source',))
    before = open_study('digits', tmp_path/'out', settings=warm, progress=False)
    run_study('digits', tmp_path/'source', settings=replace(SMALL, seed=1), n_workers=1, progress=False)
    after = open_study('digits', tmp_path/'out', settings=warm, progress=False)
    assert list(after.search.configs) == list(before.search.configs)
    assert tuple(after.search.metamodel.prior) == tuple(before.search.metamodel.prior)


def refused(capsys, *arguments) -> str:
    from llprobe.cli import main
    small = ['--levels', '0.1', '0.3', '--configs', '6', '--epochs', '2', '--jobs', '1', '--quiet']
    assert main(['run', *small, *map(str, arguments)]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    return message


def test_refusals_are_one_sentence(source, tmp_path, capsys):
    out, empty, other = tmp_path/'out', tmp_path/'empty', tmp_path/'other'
    empty.mkdir()
    assert 'holds no study' in refused(capsys, '--out', out, '--warm-start', source, empty)
    assert 'is the study itself' in refused(capsys, '--seed', '1', '--out', source, '--warm-start', source)
    assert not (out/'study.db').exists() and not (source/'warm-start.json').exists()
    open_study('digits', out, settings=replace(SMALL, warm_start=(source,)), progress=False).store.close()
    open_study('wine', other, settings=replace(SMALL, levels=(0.3, 0.6)), progress=False).store.close()
    kept = (out/'warm-start.json').read_text()
    with pytest.warns(UserWarning, match='wine tried 0 different configs'), pytest.raises(InputError, match='begun with warm_start .*wine'):
        open_study('digits', out, settings=replace(SMALL, warm_start=(other,)), progress=False)
    assert 'now unset' in refused(capsys, '--out', out, '--warm-start')
    assert (out/'warm-start.json').read_text() == kept


def test_the_word_bundled_stands_for_the_tables_of_other_data(tmp_path):
    "digits is among them, so its own study learns from the two others; and opened again it finds what it has learnt"
    settings = replace(BUDGET, warm_start=('bundled',))
    for _ in range(2):
        with open_study('digits', tmp_path, settings=settings, progress=False).store as store:
            assert [source['dataset'] for source in store.study('digits')['settings']['warm_start']] == ['cifar10-10k', 'mnist5k']
    assert 'begins with what others have shown: cifar10-10k of batch_size, dropout' in str(open_study('digits', tmp_path, settings=settings, progress=False).start)
    predicted = np.array(json.loads((tmp_path/'warm-start.json').read_text())['predictions'])
    assert predicted.shape[0] == 2 and np.isfinite(predicted).all() and (predicted.std(1) > 0.1).all()


def test_the_command_begins_with_the_tables_unless_told_otherwise(tmp_path):
    from llprobe.cli import _settings, parser
    def warm_start(*arguments): return _settings(parser().parse_args(['run', *arguments])).warm_start
    assert warm_start() == warm_start('--budget', '4') == ('bundled',)
    assert warm_start('--warm-start') == warm_start('--design', 'sobol') == ()
    assert warm_start('--warm-start', 'a', '--warm-start', 'b', 'bundled') == (Path('a'), Path('b'), Path('bundled'))
    unknown = SearchSpace('mlp', dict(width=[10, 20], label_smoothing=dict(low=0.0, high=0.2)))  # to all tables
    for settings in (SMALL, BUDGET):
        first, second = (open_study('wine', tmp_path/f'{settings.budget}-{len(w)}', unknown, replace(settings, warm_start=w), progress=False) for w in ((), ('bundled',)))
        assert first.settings.to_dict() == second.settings.to_dict() and second.start is None
        assert list(first.search.configs) == list(second.search.configs)
