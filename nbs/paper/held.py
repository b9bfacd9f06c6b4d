"""Tables that were measured at a small learning rate, without augmentation, and their figures

Lines are means over three seeds, bands go from the lowest seed to the highest. Claims stand in `claims.csv`, as they were judged when they were measured."""
from pathlib import Path
import numpy as np, pandas as pd
from fastai.vision.all import plt
from feature_erosion.plots import percent, shade_phases
from feature_erosion.runs.store import Run
from feature_erosion.runs.sweep import mean_interval
from feature_erosion.paper.figures import load_cams

class Held:
    "One measurement: `tables` by name, `settings` and `environment`"
    def __init__(self, name):
        run = Run(Path(__file__).parent/'results'/'held'/name)
        names = [f.stem for f in map(Path, run.info['files']) if f.parent.name=='tables']
        self.tables = {k:run.table(k) for k in names if (run.path/'tables'/f'{k}.csv').is_file()}
        self.settings,self.environment,self.figure = run.settings,run.info['sessions'][-1],name.split('_')[0]
    def plot(self): return _plots[self.figure](self.tables)
    # means, no −0%
    def claims(self):
        return self.tables['claims'].assign(ours=lambda d: d.ours.str.replace(r' \[.*', '', regex=True).str.replace(r'^−(?=0%$)', '', regex=True))

def all_claims(): return pd.concat([Held(f).claims() for f in _plots], ignore_index=True)

def _band(ax, d, x, y, color, **kw):
    "Mean over seeds of column `y` at each `x`, from the lowest to the highest"
    s = pd.DataFrame({k:mean_interval(v)[1:] for k,v in d.groupby(x, sort=False)[y]}, index=['mean','low','high']).T
    ax.plot(s.index, s['mean'], color=color, **kw)
    ax.fill_between(s.index, s.low.fillna(s['mean']), s.high.fillna(s['mean']), color=color, alpha=.2, lw=0)

def _panels(nets, width=4.2, height=3.4):
    "An axis for each of `nets`, two in a row"
    cols,rows = min(len(nets), 2),-(-len(nets)//2)
    axs = plt.subplots(rows, cols, figsize=(2+width*cols, height*rows), layout='constrained', squeeze=False)[1].ravel()
    for ax in axs[len(nets):]: ax.axis('off')
    return zip(axs, nets)

def _curves(ax, t, net):
    c,ph = (t[k][t[k].net==net] for k in ('curves','phases'))
    shade_phases(ax, ph[ph.phase!='start'][['phase','start_epoch','stop_epoch']].drop_duplicates().itertuples(index=False))
    for i,k in enumerate(['clean','pattern']): _band(ax, c, 'epoch', k, f'C{i}', label=k)
    percent(ax)
    ax.set(xlim=(0, c.epoch.max()), xlabel='epoch')
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.text(.01, 1.1, net, transform=ax.transAxes, weight='bold')

def _collapse(t):
    for ax,n in _panels(t['curves'].net.unique()): _curves(ax, t, n)
    ax.legend(loc='center left', bbox_to_anchor=(1.01,.5))
    return ax.figure

def _cka(t):
    for ax,(net,d) in _panels(list(t['cka'].groupby('net', sort=False)), 6., 5.):
        C = d.groupby(['before','after']).cka.mean().unstack().loc[d.before.unique(), d.before.unique()]
        im,at = ax.imshow(C, origin='lower', cmap='magma', vmin=0, vmax=1),range(0, len(C), 2)
        ax.set(title=net, xlabel='layer, after erosion', ylabel='layer, before', xticks=at, yticks=at,
               xticklabels=[i+1 for i in at], yticklabels=[i+1 for i in at])
        ax.figure.colorbar(im, ax=ax, label='debiased linear CKA')
    return ax.figure

def _layers(t):
    for ax,(net,d) in _panels(list(t['layers'].groupby('net', sort=False)), 5.5, 3.8):
        right,d = ax.twinx(),d.assign(i=d.layer.map(list(d.layer.unique()).index)+1)
        for a,y,colors in ((ax,'accuracy',('C0','C0')), (right,'rank',('C1','C3'))):
            for m,c,mark,ls in zip(('before','after'), colors, 'x.', (':','-')):
                _band(a, d[d.model==m], 'i', y, c, marker=mark, ls=ls, ms=7, label=f"{'probe' if a is ax else 'rank'}, {m}")
        percent(ax, 'linear probe accuracy')
        ax.set(xlabel='layer', title=net)
        right.set(ylim=(0,None), ylabel='numerical rank')
        lines = [sum(o, []) for o in zip(*(a.get_legend_handles_labels() for a in (ax,right)))]
        ax.legend(*lines, loc='lower left', bbox_to_anchor=(0,1.08), ncols=4, fontsize='small')
    return ax.figure

def _learning(t, phase):
    c = t['curves']
    c = c[(c.phase==phase) & (c.when=='epoch')]
    return c.assign(of_phase=c.groupby(['net','seed']).cumcount()+1)

def _relearning(t):
    fig,axs = plt.subplots(1, 2, figsize=(12,3.6), layout='constrained')
    _curves(axs[0], t, t['curves'].net.iloc[0])
    axs[0].legend(loc='lower right')
    for p,c,l in (('pretrain','C0','from scratch'), ('relearn','C3','again, after the squares')):
        _band(axs[1], _learning(t, p), 'of_phase', 'clean', c, marker='.', label=l)
    percent(axs[1], 'clean accuracy')
    axs[1].set(xlabel='epoch of the phase')
    axs[1].legend(loc='lower right')
    return fig

def _ratios(t):
    d = t['erosion'][t['erosion'].phase=='erode']
    fig,ax = plt.subplots(figsize=(6,3.6), layout='constrained')
    for net,o in d.groupby('net', sort=False):
        ax.plot(o.ratio, o.forgetting, '.', color='C0', ms=5)
        m = o.groupby('ratio').forgetting.mean()
        ax.plot(m.index, m, color='C0', label=net)
    ax.set_xscale('symlog', linthresh=min(d.ratio[d.ratio>0]))
    ax.set_xticks(sorted(d.ratio.unique()), [f'{r:g}' if r!=.9 else '' for r in sorted(d.ratio.unique())])
    ax.yaxis.set_major_formatter('{x:.0%}')
    ax.set(xlabel='share of training images with a square', ylabel='forgetting', xlim=(0,1.05))
    ax.axhline(0, color='C7', lw=.8, ls='--')
    ax.legend()
    return fig

def _cams(t):
    d = t['cams']
    return load_cams(d[(d.net==d.net.iloc[0]) & (d.seed==d.seed.iloc[0])]).plot()

def _rank(t):
    fig,ax = plt.subplots(figsize=(6,3.6), layout='constrained')
    d = t['rank']
    for i,(r,o) in enumerate(d.groupby('ratio')):
        ax.plot(o.rank_after/o.rank_before, o.relearned-o.before, 'o', color=plt.cm.viridis(i/max(1, d.ratio.nunique()-1)),
                label=f'{r:g}')
    ax.axhline(0, color='C7', lw=.8, ls='--')
    ax.yaxis.set_major_formatter('{x:+.1%}')
    ax.set(xlabel='effective rank of the penultimate layer: eroded / before', ylabel='clean accuracy: relearned − before')
    ax.legend(title='ratio', loc='center left', bbox_to_anchor=(1.01,.5))
    return fig

_plots = dict(fig1=_collapse, fig2=_collapse, fig3=_cka, fig4=_layers, fig5=_relearning, fig6=_ratios, gradcam=_cams, rank=_rank)
