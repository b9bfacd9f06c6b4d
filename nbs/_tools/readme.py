"Write README.md from nbs/index.ipynb, with its pictures in README_files/. With --check: only say whether it is up to date."
import os, re, sys
from html import escape
from pathlib import Path

from fastcore.nbio import nb2str, read_nb
from fastcore.script import call_parse
from nbdev.config import get_config
from nbdev.processors import FilterDefaults
from nbdev.readme_filter import doc_link
from docs import root, shown_width  # first: it says what to do where there is no smalldocs
from smalldocs import llms

def link(href):
    "Pages are on the documentation site, other files in the repository"
    if re.match(r'[a-zA-Z][\w+.-]*:|#', href): return href
    url = doc_link(href, get_config().doc_url)
    return f'nbs/{href}' if url==href else url

def picture(m, files):
    "A figure as large as matplotlib meant it; GitHub knows no other way to say so than an `img` tag"
    w = m[2].endswith('.png') and shown_width(files[m[2]])
    alt = escape(re.sub(r'\\(.)', r'\1', m[1]))   # smalldocs puts a backslash before brackets
    return f'<img src="{m[2]}" alt="{alt}" width="{w}">' if w else m[0]

def readme():
    "All files of the README, as `{name: bytes}`"
    nb = read_nb(root/'nbs/index.ipynb')
    FilterDefaults()(nb)
    body,files = llms.notebook(nb2str(nb), {}, 'README', llms.Prose(link, {}), str)
    body = re.sub(r'<style.*?</style>\s*', '', body, flags=re.S)
    body = re.sub(r'!\[(.*?)\]\((README_files/.*?)\)', lambda m: picture(m, files), body)
    fm = nb.frontmatter_
    return {'README.md': f"# {fm['title']}\n\n> {fm['description']}\n\n{body}\n".encode(), **files}

@call_parse
def main(
    check:bool=False, # Only say which files are out of date
):
    "Write README.md from nbs/index.ipynb"
    os.chdir(root); sys.path.insert(0, str(root))
    new = readme()
    old = {str(f): f.read_bytes() for f in [Path('README.md'), *Path('README_files').glob('*')] if f.exists()}
    stale = sorted(f for f in {**old, **new} if old.get(f)!=new.get(f))
    if check: return stale and sys.exit(f'Out of date: {", ".join(stale)}. Run: make readme')
    for f in old.keys()-new.keys(): Path(f).unlink()
    for f,data in new.items():
        Path(f).parent.mkdir(exist_ok=True)
        Path(f).write_bytes(data)
