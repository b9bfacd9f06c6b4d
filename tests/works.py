"""What works with what: the situations that tests are marked with, as a table.

python tests/works.py nbs/works.csv     after a marker was added or changed"""
import sys
from pathlib import Path

class Collect:
    "A pytest plugin that looks at markers"
    def __init__(self): self.rows = []
    def pytest_collection_modifyitems(self, items):
        for o in items: self.rows += [dict(m.kwargs, test=f"{Path(o.fspath).name}::{o.originalname}") for m in o.iter_markers('works')]

def situations():
    "A row each: kind, what, how, and the test that holds it"
    import pandas as pd, pytest
    c,here = Collect(),Path(__file__).parent
    assert pytest.main(['--collect-only', '-qq', str(here)], plugins=[c])==0
    return pd.DataFrame(c.rows)[['kind','what','how','test']].drop_duplicates().sort_values(['kind','what','test']).reset_index(drop=True)

if __name__=='__main__':
    df = situations()
    df.to_csv(sys.argv[1], index=False)
    print(f'{len(df)} situations')
