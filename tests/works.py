"""What works with what: the situations that tests are marked with, as a table.

python tests/works.py nbs/works.csv     after a marker was added or changed"""
import io, sys
from contextlib import redirect_stdout
from pathlib import Path

class Collect:
    "A pytest plugin that looks at markers"
    def __init__(self): self.rows = []
    def pytest_collection_modifyitems(self, items):
        for o in items:
            self.rows += [dict(m.kwargs, test=f"{Path(o.fspath).name}::{o.originalname}") for m in o.iter_markers('works')]

def situations():
    "A row each: kind, what, how, and the test that holds it"
    import pandas as pd, pytest
    c,files = Collect(),[str(f) for f in Path(__file__).parent.glob('test_*.py') if 'works(' in f.read_text('utf-8')]
    with redirect_stdout(io.StringIO()) as said:
        assert pytest.main(['--collect-only', '-qq', *files], plugins=[c])==0, said.getvalue()
    df = pd.DataFrame(c.rows)[['kind','what','how','test']].drop_duplicates()
    df['what'] = df.what.str.replace(r'^An? ', lambda m: m[0].lower(), regex=True)
    return df.sort_values(['kind','what','test'], key=lambda o: o.str.lower().str.lstrip('`(')).reset_index(drop=True)

def main(out):
    df = situations()
    df.to_csv(out, index=False)
    print(f'{len(df)} situations')

if __name__=='__main__': main(sys.argv[1])
