"What the pages of the figures share: results by the paper's recipe, and what they were made with"
from pathlib import Path
import json, pandas as pd
from feature_erosion.paper.recipes import load_result
from feature_erosion.runs.store import Run

def measured(name):
    "A figure's result, with the environments of all sessions in which it was made"
    res = load_result(folder := Path(__file__).parent/'results'/name)
    res.sessions = Run(folder).info['sessions']
    return res

def claims(res):
    "A row for each claim; the network is named where there are several"
    d = res.claims()
    return d.set_index(['net','claim'] if d.net.nunique()>1 else 'claim')[['paper','ours','rule','agrees']]

_shown = 'arch width data n weights bs bf16 opt lr sched lengths ratio'.split()

def networks(res):
    "Settings of the networks: those that differ in ratio, lr or lengths alone share a column, others of the same name are numbered"
    d = pd.DataFrame([{k:n[k] for k in ['name',*_shown]} for n in res.settings['nets']], dtype=object).fillna('–').astype(str)
    for k in ('ratio','lr','lengths'):
        d = d.groupby([c for c in d if c!=k], sort=False)[k].agg(', '.join).reset_index()
    number = ' '+(d.groupby('name').cumcount()+1).astype(str)
    return d.set_index(d.name+number.where(d.name.duplicated(keep=False), '')).rename_axis(None)[_shown].T

def _machine(e):
    on = e['device'] if e.get('device', 'cpu')!='cpu' else f"{e['cpus']} cores of {e['processor']}"
    return f"{on}, torch {e['torch']}, fastai {e['fastai']}"

def where(res):
    "Seeds, and the environment of each session"
    n = res.settings['seeds']
    return '; '.join([f"{n} seed{'s'*(n>1)}", *dict.fromkeys(map(_machine, res.sessions))])

def step_times():
    "How long a training step takes with each mitigation, relative to plain finetuning: medians of the benchmark"
    rows = json.loads((Path(__file__).parents[2]/'tests/bench/results.json').read_text('utf-8'))['rows']
    times = {o['name'].removeprefix('a training step with '):1/o['ratio'] for o in rows if o['module']=='mitigation_rows'}
    return pd.Series({'plain finetuning':1., **times})
