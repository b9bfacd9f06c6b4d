"Packaging: everything comes from settings.ini."
from configparser import ConfigParser
from setuptools import setup, find_packages

cfg = ConfigParser()
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
lib = cfg['lib_name']
stages = {'3': 'Development Status :: 3 - Alpha', '4': 'Development Status :: 4 - Beta', '5': 'Development Status :: 5 - Production/Stable'}
extra = '_requirements'

setup(
    name=lib, version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], license=cfg['license'], url=cfg['git_url'],
    long_description=open('README.md', encoding='utf-8').read(), long_description_content_type='text/markdown',
    classifiers=[stages[cfg['status']], 'Intended Audience :: Science/Research', 'Programming Language :: Python :: 3',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    python_requires=f">={cfg['min_python']}", packages=find_packages(include=[lib, f'{lib}.*']), include_package_data=True,
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix(extra): v.split() for k,v in cfg.items() if k.endswith(extra)},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f'{lib}={lib}._modidx:d']})
