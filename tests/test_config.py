"""Options of a training: words become values of the option's kind, what does not is refused in one sentence."""
import pytest

from moe_zoo.engine.config import load_config, parse_overrides
from moe_zoo.errors import InputError


def option(text):
    """The value that an option has after `text` on the command line."""
    return getattr(load_config({}, parse_overrides([text])), text.partition('=')[0])


@pytest.mark.parametrize('text, value', [
    ('amp=yes', True), ('amp=off', False), ('amp=1', True), ('amp=0', False), ('amp=TRUE', True),
    ('epochs=12', 12), ('epochs=1e2', 100), ('epochs=3.0', 3), ("epochs='7'", 7),
    ('lr=3e-4', 3e-4), ('lr=1', 1.), ('model=a=b', 'a=b'), ('opt=[', '['),  # no YAML: the text itself
    ('opt_betas=0.9,0.99', [.9, .99]), ('opt_betas=[0.9, 0.99]', [.9, .99]), ('opt_betas=0.9 0.99', [.9, .99]),
    ('model_kwargs={a: 1}', {'a': 1}),
    ("model_kwargs='a=1 b=[2] c=no'", {'a': 1, 'b': [2], 'c': False}),
    ('torchcompile=true', 'inductor'), ('torchcompile=eager', 'eager'),
])
def test_words_become_values_of_the_kind_of_the_option(text, value):
    found = option(text)
    assert found == value and type(found) is type(value)


def test_an_option_without_a_value_has_its_default():
    assert option('epochs=null') == load_config({}).epochs and option('model_kwargs=null') == {}
    option('model_kwargs=null')['a'] = 1
    assert option('model_kwargs=null') == {}  # nobody shares it


@pytest.mark.parametrize('text, sentence', [
    ('epochs=3.5', 'epochs=3.5 in .* must be int'), ('epochs=many', "epochs='many' in .* must be int"),
    ('epochs=true', 'epochs=True in .* must be int'), ('epochs=.inf', 'epochs=inf in .* must be int'),
    ('lr=[1]', r'lr=\[1\] in .* must be float'), ('amp=2', 'amp=2 in .* must be bool'),
    ('amp=maybe', "amp='maybe' in .* must be bool"), ('opt_betas=a,b', "opt_betas='a,b' in .* must be a list of float"),
    ("model_kwargs='a=[1, 2]'", 'model_kwargs=.* in .* must be dict'),  # pairs end at blanks
    ('model_kwargs=a', "model_kwargs='a' in .* must be dict"), ('opt=true', 'opt=True in .* must be str'),
    ('epochs=0', 'epochs=0: give at least 1'), ('grad_accum_steps=-1', 'grad_accum_steps=-1: give at least 1'),
    ('amp_dtype=float8', "amp_dtype='float8': use one of 'float16', 'bfloat16'"),
    ('model_dtype=int8', "model_dtype='int8': use one of 'float32', 'bfloat16', 'float16'"),
    ('aug_splits=1', 'aug_splits=1: use 0 for none, or at least 2'), ('stop_epoch=0', 'stop_epoch=0: give at least 1'),
    ('val_share=1', 'val_share=1.0: give a share of the training images from 0 to below 1'),
    ('route_consistency_weight=1', r'route_consistency_weight=\[1.0\]: say also route_consistency=jsd or =prc'),
    ('jsd_loss=true', 'jsd_loss=true compares augmented versions of an image: set aug_splits to at least 2'),
    ('epochs', "Cannot read 'epochs': options are given as key=value, for example epochs=10"),
    ('=1', "Cannot read '=1': options are given as key=value"),
])
def test_what_is_no_value_of_an_option_is_refused(text, sentence):
    with pytest.raises(InputError, match=sentence):
        option(text)


def test_mixed_precision_keeps_the_model_in_float32():
    with pytest.raises(InputError, match='amp=true with model_dtype=bfloat16: mixed precision keeps the model in'):
        load_config({}, {'amp': True, 'model_dtype': 'bfloat16'})
    assert load_config({}, {'amp': True, 'model_dtype': 'float32'}).amp


@pytest.mark.parametrize('content, sentence', [
    (b'epochs: [', "recipe.yaml' is not valid YAML: .*expected"), (b'\xff', "recipe.yaml' is not valid YAML: "),
    (b'- epochs', "recipe.yaml' must hold 'name: value' lines, not a list"),
])
def test_files_that_are_no_recipe_are_refused(content, sentence, tmp_path):
    (tmp_path / 'recipe.yaml').write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        load_config(tmp_path / 'recipe.yaml')
