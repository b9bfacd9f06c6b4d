"The page `What works with what` says what the tests say."
import pandas as pd
from conftest import python, root

def test_the_table_is_that_of_the_tests(tmp_path):
    "`python tests/works.py nbs/works.csv` writes it anew"
    python('-W', 'ignore', 'tests/works.py', tmp_path/'works.csv')
    now,kept = (pd.read_csv(f) for f in (tmp_path/'works.csv', root/'nbs'/'works.csv'))
    assert now.equals(kept), 'run: python tests/works.py nbs/works.csv'
    assert len(now)>=80 and not now[['kind','what']].duplicated().any() and set(now.kind)=={'images','folders','labels','loaders','callbacks','models'}
