"The page `What works with what` says what the tests say."
import pandas as pd
import works
from conftest import root
from run_notebooks import forked

def test_the_table_is_that_of_the_tests(tmp_path):
    "`python tests/works.py nbs/works.csv` writes it anew"
    p = forked(works.main, tmp_path/'works.csv')
    p.start(), p.join()
    assert p.exitcode==0
    now,kept = (pd.read_csv(f) for f in (tmp_path/'works.csv', root/'nbs'/'works.csv'))
    assert now.equals(kept), 'run: python tests/works.py nbs/works.csv'
    assert len(now)>=80 and not now[['kind','what']].duplicated().any()
    assert set(now.kind)=={'images','folders','labels','loaders','callbacks','models'}
