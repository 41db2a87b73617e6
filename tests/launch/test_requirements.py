"""The packages and versions of Python in the files for an environment: they agree, and nothing is missing."""

import re
import subprocess
import sys
import tomllib
import zipfile

from tests.helpers import ROOT
from tests.test_layers import FILES, OURS, PAGES, imports

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
OPTIONAL = {'datasets', 'safetensors'}  # installed by users who need them
NAMES = {'PIL': 'pillow', 'sklearn': 'scikit-learn', 'torch_fidelity': 'torch-fidelity'}  # module -> package


def pins(file: str) -> dict[str, str]:
    """Package -> version of each line, which may hold nothing else: no address, no hash."""
    lines = (ROOT / file).read_text().splitlines()
    found = dict(re.fullmatch(r'([\w-]+)==([\w.]+)', line).groups() for line in lines)
    assert len(found) == len(lines)
    return {name.lower(): version for name, version in found.items()}


def test_every_package_that_is_imported_is_declared():
    files = [*FILES, *(path for path in PAGES if 'benchmarks' not in path.parts)]
    imported = {name.split('.')[0] for path in files for name in imports(path)}
    ours = {name.split('.')[0] for name in OURS} | {'examples'}
    packages = {NAMES.get(name, name) for name in imported - sys.stdlib_module_names - ours}
    declared = {re.match(r'[\w-]+', text)[0] for text in PROJECT['project']['dependencies']}
    assert packages - declared == OPTIONAL
    assert declared <= pins('requirements.txt').keys()


def test_the_lock_has_every_pin_and_what_the_packages_need():
    lock = pins('requirements.lock')
    for file in ('requirements.txt', 'tests/requirements.txt'):
        assert pins(file).items() <= lock.items(), file
    assert {'jinja2', 'sympy', 'contourpy', 'joblib'} <= lock.keys()  # needed by torch, matplotlib and scikit-learn


def test_the_versions_of_python_are_the_same_everywhere():
    assert PROJECT['project']['requires-python'] == '>=3.11'
    assert PROJECT['tool']['ruff']['target-version'] == 'py311'
    assert PROJECT['tool']['basedpyright']['pythonVersion'] == '3.11'
    shell = (ROOT / 'launch/environment.sh').read_text()
    assert '(3, 11) <= sys.version_info[:2] <= (3, 14)' in shell and 'is not 3.11 to 3.14' in shell
    assert 'with Python 3.11 to 3.14.' in (ROOT / 'README.md').read_text()
    assert "['3.11', '3.14']" in (ROOT / '.github/workflows/ci.yml').read_text()


def test_pages_for_github_name_what_exists():
    """The version is the project's, names of files are files, and every template of an issue asks for run.json."""
    assert f'version: {PROJECT["project"]["version"]}\n' in (ROOT / 'CITATION.cff').read_text()
    templates = [path.read_text() for path in (ROOT / '.github/ISSUE_TEMPLATE').glob('*.md')]
    assert len(templates) == 3 and all('run.json' in text for text in templates)
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    assert len(text.splitlines()) <= 30
    for name in re.findall(r'\b(?:\w+/)*\w+\.(?:py|md|sh)\b', text.replace('examples/X.py', '')):
        assert (ROOT / name).is_file(), name
    for name, file in re.findall(r'`([A-Z_]+)` (?:of |\()`([\w/.]+)`', text):
        assert f'{name}' in (ROOT / file).read_text(), name


def test_a_wheel_holds_the_requirements_and_no_code(tmp_path):
    """Building one fails if setuptools looks for packages: the top level has many."""
    for name in ('pyproject.toml', 'README.md', 'LICENSE', 'main.py', 'networks/__init__.py', 'solvers/__init__.py'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    code = 'from setuptools import build_meta; print(build_meta.build_wheel("."))'
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert 'Deprecat' not in done.stderr, done.stderr
    (wheel,) = tmp_path.glob('*.whl')
    files = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in files if '.dist-info/' not in name]
    (metadata,) = [name for name in files if name.endswith('METADATA')]
    assert 'Requires-Dist: scipy>=1.11' in zipfile.ZipFile(wheel).read(metadata).decode()
