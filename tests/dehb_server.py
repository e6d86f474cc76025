"""DEHB behind a pipe: it needs NumPy below 2, so it runs in an environment of its own and never imports llprobe.

One JSON object a line. In: {"seed", "parameters": {name: number of choices or null}, "n_rungs", "eta"} starts a search, also
after another; {"config": what was really evaluated, "fitness": lower is better, "cost"} answers the last proposal. Out, after
each line: {"config": {name: value}, "rung": 0 for the cheapest}. The end of the input ends it.
"""
import json
import math
import os
import sys
import tempfile

from ConfigSpace import Categorical, Configuration, ConfigurationSpace, Float
from dehb import DEHB
from loguru import logger


def make_space(parameters: dict) -> ConfigurationSpace:
    space = ConfigurationSpace()
    for name, n_choices in parameters.items():
        space.add(Float(name, (0, 1)) if n_choices is None else Categorical(name, list(range(n_choices))))
    return space


def start(setup: dict, folder: str) -> DEHB:
    logger.remove()  # each DEHB adds a log file
    top = setup['eta']**(setup['n_rungs']-1)
    # a shade below 1, since DEHB rounds the number of its fidelities down
    return DEHB(cs=make_space(setup['parameters']), min_fidelity=0.999, max_fidelity=top, eta=setup['eta'], seed=setup['seed'],
                n_workers=1, save_freq='end', output_path=folder, log_level='ERROR')


def tell(dehb: DEHB, job: dict, told: dict) -> None:
    # the table's config stands in for the proposal, so that DEHB learns where the score was really measured
    actual = dehb.configspace_to_vector(Configuration(dehb.cs, values=told['config']))
    dehb.config_repository.configs[job['config_id']].config = actual
    dehb.tell(job, dict(fitness=told['fitness'], cost=told['cost']))


def main() -> None:
    out = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # DEHB logs to stdout
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            message = json.loads(line)
            if 'seed' in message:
                dehb, eta = start(message, folder), message['eta']
            else:
                tell(dehb, job, message)
            job = dehb.ask()
            config = {name: value.item() if hasattr(value, 'item') else value for name, value in dict(job['config']).items()}
            print(json.dumps(dict(config=config, rung=round(math.log(job['fidelity'], eta)))), file=out, flush=True)


if __name__ == '__main__':
    main()
