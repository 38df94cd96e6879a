"""CITATION.cff: what the format asks for, and nothing that is said otherwise elsewhere."""
import tomllib

import yaml

from moe_zoo import __version__

# of the format's root object, version 1.2.0
KEYS = {'abstract', 'authors', 'cff-version', 'commit', 'contact', 'date-released', 'doi', 'identifiers', 'keywords',
        'license', 'license-url', 'message', 'preferred-citation', 'references', 'repository', 'repository-artifact',
        'repository-code', 'title', 'type', 'url', 'version'}


def test_it_is_valid_and_agrees_with_the_package(repository):
    citation = yaml.safe_load((repository / 'CITATION.cff').read_text(encoding='utf-8'))
    assert {'authors', 'cff-version', 'message', 'title'} <= citation.keys() <= KEYS
    assert citation['cff-version'] == '1.2.0' and citation['type'] == 'software'
    assert citation['authors'] == [{'name': 'The moe_zoo authors'}]  # an entity
    assert all(isinstance(citation[key], str) and citation[key] for key in ('message', 'title', 'abstract', 'version'))
    project = tomllib.loads((repository / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    assert citation['version'] == __version__
    assert citation['license'] == project['license'] and citation['keywords'] == project['keywords']
