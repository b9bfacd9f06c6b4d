"`make bench`: every row is a ratio to a named peer in the same run. Writes results.md and results.json. `make bench only=cka` runs one module, `repeats=5` more often."
import importlib, json, os, platform, statistics as st, sys, tempfile, time
from pathlib import Path
here = Path(__file__).parent
sys.path.insert(0, str(here))

def cpu():
    lines = [l for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')] if Path('/proc/cpuinfo').exists() else []
    return lines[0].split(':')[1].strip() if lines else platform.machine()

def machine():
    import torch, sklearn, fastai, common
    return dict(cpu=cpu(), cores=os.cpu_count(), threads=torch.get_num_threads(), python=platform.python_version(),
                torch=torch.__version__, fastai=fastai.__version__,
                sklearn=sklearn.__version__, device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU',
                data='CIFAR-10, trained ResNet-20' if common.real
                else 'noise, untrained ResNet-20: CIFAR-10 or FEATURE_EROSION_RESNET20 is missing')

def sec(s): return f'{s:.3g}' if s<10 else f'{s:.1f}'
def spread(s): return f'{sec(st.median(s))} ({sec(min(s))}–{sec(max(s))})'

def line(r):
    if r.get('skipped'): return f"| {r['name']} | skipped: {r['skipped']} | {r['peer']} | | | | | | |"
    mb = f"{r['ours_mb']:+.0f} / {r['peer_mb']:+.0f}" if r.get('peer_mb') is not None else f"{r['ours_mb']:+.0f} / –" if r.get('ours_mb') is not None else ''
    goal = '' if r.get('target') is None else f"≥ {r['target']:g} {verdict(r)}"
    return f"| {r['name']} | {spread(r['ours_s'])} | {r['peer']} | {spread(r['peer_s'])} | {len(r['ours_s'])} | {r['ratio']:.2f} ({r['low']:.2f}–{r['high']:.2f}) | {goal} | {mb} | {r.get('check') or ''} |"

def verdict(r):
    "Met or missed where the whole interval is on one side of the target, and more than one turn was taken"
    sure = len(r['ours_s'])>1
    return 'met' if sure and r['low']>=r['target'] else 'missed' if sure and r['high']<r['target'] else 'not clear'

head = '''| what | seconds, median (min–max) | peer | seconds | turns | peer ÷ ours | target | MB more, ours / peer | check |
|---|---|---|---|---|---|---|---|---|'''

def about(m):
    return f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, torch {m['torch']}, fastai {m['fastai']}, scikit-learn {m['sklearn']}, Python {m['python']}; {m['device']}; {m['data']}"

def modules(only):
    "Names of what to run"
    all_ = [*sorted(o.stem for o in here.glob('*_rows.py')), 'growth', 'shares']
    names = [o for o in all_ if o.startswith(only)]
    if not names: sys.exit(f"only={only!r}: must begin one of {', '.join(all_)}")
    return names

def measure(names, repeats):
    "Rows of the modules, printed as they come; how cost grows, and shares of the time, if those are wanted"
    from common import compared
    rows = []
    print(head)
    for n in names:
        if not n.endswith('_rows'): continue
        for r in importlib.import_module(n).rows(repeats):
            rows.append(dict(module=n, **r, **({} if r.get('skipped') else compared(r['ours_s'], r['peer_s']))))
            print(line(rows[-1]), flush=True)
    growth = importlib.import_module('growth').points() if 'growth' in names else None
    if growth: print(importlib.import_module('growth').table(growth))
    return rows,growth,importlib.import_module('shares').shares() if 'shares' in names else None

def merged(old, names, rows):
    "Rows of modules that were not run stay, each with its machine; so does one that was measured where now something is missing"
    kept = [dict(o, on=o.get('on') or about(old['machine'])) for o in old.get('rows', [])]
    measured = [o for o in kept if not o.get('skipped')]
    rows = [next((o for o in measured if r.get('skipped') and (o['module'],o['name'])==(r['module'],r['name'])), r) for r in rows]
    return sorted([o for o in kept if o['module'] not in names]+rows, key=lambda r: r['module'])

def by_machine(rows):
    "The machine with most rows first"
    parts = {on:[r for r in rows if r['on']==on] for on in dict.fromkeys(r['on'] for r in rows)}
    return sorted(parts.items(), key=lambda o: -len(o[1]))

def main(only='', repeats='3'):
    start,names,store = time.time(),modules(only),here/'results.json'
    old = json.loads(store.read_text()) if store.exists() else {}
    with tempfile.TemporaryDirectory() as tmp:
        os.environ['BENCH_TMP'] = tmp
        rows,growth,shares = measure(names, int(repeats))
    now = machine()
    rows = merged(old, names, [dict(r, on=about(now)) for r in rows])
    main_one = now if by_machine(rows)[0][0]==about(now) else old['machine']
    res = dict(machine=main_one, seconds=round(time.time()-start), rows=rows, growth=growth or old.get('growth', []),
               shares=shares or old.get('shares', []))
    store.write_text(json.dumps(res, indent=1)+'\n')
    text = '# Benchmarks\n'+''.join(f"\n`make bench` on {on}.\n\n{head}\n"+'\n'.join(map(line, rs))+'\n'
                                    for on,rs in by_machine(rows))
    if res['growth']: text += f"\n## How cost grows\n\n{importlib.import_module('growth').table(res['growth'])}\n"
    (here/'results.md').write_text(text)
    print(f"{res['seconds']} s, {about(now)}")

if __name__=='__main__': main(**dict(o.split('=', 1) for o in sys.argv[1:]))
