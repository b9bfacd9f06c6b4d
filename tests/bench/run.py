"`make bench`: every row is a ratio to a named peer in the same run. Writes results.md and results.json. `make bench only=cka` runs one module, `repeats=5` more often."
import importlib, json, os, platform, statistics as st, sys, tempfile, time
from pathlib import Path
here = Path(__file__).parent
sys.path.insert(0, str(here))

def cpu():
    lines = [l for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')] if Path('/proc/cpuinfo').exists() else []
    return lines[0].split(':')[1].strip() if lines else platform.machine()

def machine():
    import torch, sklearn, fastai
    return dict(cpu=cpu(), cores=os.cpu_count(), threads=torch.get_num_threads(), python=platform.python_version(), torch=torch.__version__, fastai=fastai.__version__,
                sklearn=sklearn.__version__, device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU')

def spread(s): return f'{st.median(s):.2f} ({min(s):.2f}–{max(s):.2f})'

def line(r):
    ratio = st.median(r['peer_s'])/st.median(r['ours_s'])
    mb = f"{r['ours_mb']:+.0f} / {r['peer_mb']:+.0f}" if r.get('peer_mb') is not None else f"{r['ours_mb']:+.0f} / –" if r.get('ours_mb') is not None else ''
    goal = '' if r.get('target') is None else f"≥ {r['target']:g} {'✓' if ratio>=r['target'] else '✗'}"
    return f"| {r['name']} | {spread(r['ours_s'])} | {r['peer']} | {spread(r['peer_s'])} | {len(r['ours_s'])} | {ratio:.2f} | {goal} | {mb} | {r.get('check') or ''} |"

head = '''| what | seconds, median (min–max) | peer | seconds | n | peer ÷ ours | target | MB more, ours / peer | check |
|---|---|---|---|---|---|---|---|---|'''

def main(only='', repeats='3'):
    start,names = time.time(),[o.stem for o in sorted(here.glob('*_rows.py')) if o.stem.startswith(only)]
    if not names: sys.exit(f"only={only!r}: must begin one of {', '.join(o.stem for o in sorted(here.glob('*_rows.py')))}")
    store,rows = here/'results.json',[]
    old = json.loads(store.read_text())['rows'] if store.exists() and only else []
    with tempfile.TemporaryDirectory() as tmp:
        os.environ['BENCH_TMP'] = tmp
        print(head)
        for n in names:
            for r in importlib.import_module(n).rows(int(repeats)):
                rows.append(dict(module=n, **r))
                print(line(r), flush=True)
    rows = sorted([o for o in old if o['module'] not in names]+rows, key=lambda r: r['module'])
    m = machine()
    about = f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, torch {m['torch']}, fastai {m['fastai']}, scikit-learn {m['sklearn']}, Python {m['python']}"
    store.write_text(json.dumps(dict(machine=m, rows=rows), indent=1)+'\n')
    (here/'results.md').write_text(f'# Benchmarks\n\n`make bench` on {about}.\n\n{head}\n'+'\n'.join(map(line, rows))+'\n')
    print(f'{time.time()-start:.0f} s, {about}')

if __name__=='__main__': main(**dict(o.split('=', 1) for o in sys.argv[1:]))
