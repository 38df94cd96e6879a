"""`moe-zoo compare`: the paired bootstrap on numbers, then on runs, their seeds, their twin and files of outcomes."""
import json

import numpy as np
import pytest
from image_folders import write_images

from moe_zoo.analysis.bootstrap import RESAMPLES, paired_difference
from moe_zoo.cli import main
from moe_zoo.engine.difference import compare_runs
from moe_zoo.engine.outcomes import FILE, Outcomes, read_outcomes
from moe_zoo.errors import InputError


def test_a_run_compared_with_itself_differs_by_exactly_nothing():
    right = np.random.default_rng(0).random((3, 200)) < [[0.6], [0.7], [0.8]]
    for rows in (right, right[:1]):
        found = paired_difference(rows, rows, paired_seeds=True)
        assert (found.mean, found.low, found.high, found.told) == (0, 0, 0, False)
        assert found.only_ours == found.only_theirs == 0 and found.both + found.neither == 200


def test_ten_images_by_hand():
    """Ours right on 0..6, theirs on 5..9: both on 2, ours alone on 5, theirs alone on 3, none on 0; 70 - 50 = 20."""
    ours, theirs = np.arange(10) < 7, np.arange(10) >= 5
    found = paired_difference(ours, theirs)
    assert (found.both, found.only_ours, found.only_theirs, found.neither) == (2, 5, 3, 0)
    assert (found.ours, found.theirs, found.mean) == ((70,), (50,), pytest.approx(20))
    # One image's difference has mean 0.2 and variance 0.8 - 0.04 = 0.76; the mean of ten has deviation 0.276, so that
    # the normal interval is 20 +- 54 points. Resamples move in steps of 10 points.
    assert found.low == pytest.approx(20 - 54, abs=10) and found.high == pytest.approx(20 + 54, abs=10)
    again = paired_difference(ours, theirs)
    other = paired_difference(ours, theirs, random_state=1, resamples=2000)
    assert again == found and found.resamples == RESAMPLES and (other.random_state, other.resamples) == (1, 2000)


def test_images_count_once_however_alike_they_are():
    """Grouping images that all seeds judge alike is no approximation: drawing them one by one gives the same spread."""
    random = np.random.default_rng(3)
    ours, theirs = random.random((2, 300)) < [[0.8], [0.7]]
    found = paired_difference(ours, theirs)
    drawn = random.integers(0, 300, (4000, 300))
    low, high = np.quantile(100 * (ours[drawn].mean(axis=1) - theirs[drawn].mean(axis=1)), [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.7) and found.high == pytest.approx(high, abs=0.7)


def simulate(random, seeds, images=400, gain=0.05, spread=0.0):
    """Outcomes of two sides on new images: hard ones and easy ones for both; seeds differ by `spread`."""
    ease = random.beta(2, 1, images)
    sides = []
    for shift in (gain / 2, -gain / 2):
        skill = shift + spread * random.standard_normal((seeds, 1))
        sides.append(random.random((seeds, images)) < np.clip(0.1 + 0.8 * ease + skill, 0, 1))
    return sides


def test_a_planted_difference_is_covered_about_95_times_in_100():
    """400 simulations of one seed each: between 92 and 98 % (a binomial of 400 at 95 % has a deviation of 1.1 %)."""
    random = np.random.default_rng(1)
    covered, lengths = 0, []
    for _ in range(400):
        found = paired_difference(*simulate(random, seeds=1), resamples=1000)
        covered += found.low <= 5 <= found.high
        lengths.append(found.high - found.low)
    assert 0.92 * 400 <= covered <= 0.98 * 400
    # 1.96 deviations of a mean of 400 differences of variance about 2 x 0.19, twice: 12 points
    assert 9 < np.mean(lengths) < 15


def test_seeds_are_part_of_the_interval():
    """Five seeds a side whose accuracies differ by 3 points: the interval covers, and a single seed's must not."""
    random = np.random.default_rng(2)
    covered, alone = 0, 0
    for _ in range(100):
        ours, theirs = simulate(random, seeds=5, images=200, spread=0.03)
        found = paired_difference(ours, theirs, resamples=400)
        covered += found.low <= 5 <= found.high
        one = paired_difference(ours[:1], theirs[:1], resamples=400)
        alone += one.low <= 5 <= one.high
    assert covered >= 90 and alone < covered


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(InputError, match=r'the same images \(and seeds\) on both sides, not \(1, 4\) and \(1, 5\)'):
        paired_difference(np.ones(4), np.ones(5))
    with pytest.raises(InputError, match=r'not \(2, 4\) and \(3, 4\) outcomes'):  # paired seeds, but not as many
        paired_difference(np.ones((2, 4)), np.ones((3, 4)), paired_seeds=True)
    with pytest.raises(InputError, match=r'not \(1, 0\) and \(1, 0\) outcomes'):
        paired_difference(np.ones((1, 0)), np.ones((1, 0)))
    assert paired_difference(np.ones(4), np.ones(4), resamples=100).resamples == 100
    with pytest.raises(InputError, match='--resamples 99: give at least 100'):
        paired_difference(np.ones(4), np.ones(4), resamples=99)
    with pytest.raises(InputError, match='--resamples 5: give at least 100'):
        paired_difference(np.ones(4), np.ones(4), resamples=5)


# ---- files and runs

def write_outcomes(path, right, names=None, targets=None):
    targets = np.zeros(len(right), dtype=int) if targets is None else np.asarray(targets)
    likeliest = np.stack([np.where(right, targets, targets + 1), np.where(right, targets + 1, targets)], axis=1)
    names = names or [f'{i}.png' for i in range(len(right))]
    path.parent.mkdir(parents=True, exist_ok=True)
    Outcomes(names, targets, likeliest, np.full(len(right), 0.9), np.ones(len(right)), {'model': 'm'}).write(path)
    return str(path)


def write_run(folder, right, seed=0, model='vmoe_vit_s', routed=True, **options):
    """A finished run as train-imagenet leaves it, without checkpoints."""
    write_outcomes(folder / FILE, np.asarray(right))
    options = {'model': model, 'epochs': 1, 'seed': seed, 'dataset': 'digits', **options}
    (folder / 'args.yaml').write_text(''.join(f'{key}: {json.dumps(value)}\n' for key, value in options.items()))
    top1, column = 100 * np.mean(right), ',balance_blocks.1.mlp' if routed else ''
    value = ',0.9' if routed else ''
    (folder / 'summary.csv').write_text(
        f'epoch,train_loss,eval_loss,eval_top1,eval_top5{column}\n0,1.0,1.0,{top1},100.0{value}\n')


def test_files_of_outcomes(tmp_path, capsys):
    first = write_outcomes(tmp_path / 'first.json', np.arange(10) < 7)
    second = write_outcomes(tmp_path / 'second.json', np.arange(10) >= 5)
    assert main(['compare', first, second, '--resamples', '2000', '--json', str(tmp_path / 'out.json')]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ['first: top-1 70 %', 'second: top-1 50 %']
    assert lines[2].startswith('difference +20.00 points, 95 % interval -') and 'it holds 0' in lines[2]
    assert lines[3] == 'right on both 2, on the first alone 5, on the second alone 3, on neither 0'
    assert lines[4] == 'paired bootstrap: 2,000 resamples of the 10 images; random state 0'
    assert json.loads((tmp_path / 'out.json').read_text())['resamples'] == 2000


@pytest.mark.parametrize('change, sentence', [
    (dict(right=[True] * 9), r"'a' saw 10 images, 'b' 9: give --data-dir DIR"),
    (dict(names=['1.png', '0.png', *(f'{i}.png' for i in range(2, 10))]),
     r"'b' saw the images in another order: image 1 is '0.png' for 'a' and '1.png' there; give --data-dir"),
    (dict(names=['x.png', *(f'{i}.png' for i in range(1, 10))]),
     r"'b' saw other images: image 1 is '0.png' for 'a' and 'x.png' there"),
    (dict(targets=[0] * 9 + [1]), r"'b' saw other labels: image '9.png' is of class 0 for 'a' and 1 there"),
])
def test_other_images_are_told(tmp_path, change, sentence):
    a = write_outcomes(tmp_path / 'a.json', np.ones(10, dtype=bool))
    b = write_outcomes(tmp_path / 'b.json', **{'right': np.ones(10, dtype=bool), **change})
    with pytest.raises(InputError, match=sentence):
        compare_runs([a, b])


def test_seeds_of_runs_and_their_twins(tmp_path, capsys):
    """Two seeds with a twin each: seeds are drawn in pairs, and the run alone is held against its twin."""
    wide, narrow = np.arange(20) < 15, np.arange(20) < 10
    for seed in (0, 1):
        write_run(tmp_path / 'run' / f'seed{seed}', np.roll(wide, seed), seed)
        write_run(tmp_path / 'run' / f'seed{seed}' / 'twin', narrow, seed, 'vit_base_patch32_224', routed=False)
    sides, found = compare_runs([tmp_path / 'run'])
    assert [side.seeds for side in sides] == [(0, 1), (0, 1)] and found.paired_seeds
    assert (found.ours, found.theirs, found.mean) == ((75, 75), (50, 50), pytest.approx(25))
    assert found.only_ours == pytest.approx(5.5) and found.only_theirs == pytest.approx(0.5)  # seed 1 misses image 0
    assert main(['compare', str(tmp_path / 'run'), str(tmp_path / 'run' / 'seed0')]) == 0
    said = capsys.readouterr().out
    assert 'difference +0.00 points' in said and 'resamples of the 20 images and the seeds, each side by itself' in said
    assert 'one seed: how much another seed would change the result is not in the interval' in said
    _, same = compare_runs([tmp_path / 'run', tmp_path / 'run'])
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert main(['compare', str(tmp_path / 'run')]) == 0
    assert 'few seeds: where seeds differ by more than images do, the interval is too narrow' in capsys.readouterr().out


def test_runs_that_cannot_be_compared(tmp_path, capsys):
    write_run(tmp_path / 'a', np.ones(4, dtype=bool))
    with pytest.raises(InputError, match="a' has no dense twin beside it: name the other run, or train with --twin"):
        compare_runs([tmp_path / 'a'])
    (tmp_path / 'a' / FILE).unlink()
    with pytest.raises(InputError, match=r"a' keeps neither outcomes.json nor last.pth.tar"):
        compare_runs([tmp_path / 'a', tmp_path / 'a'])
    with pytest.raises(InputError, match='no finished run'):
        compare_runs([tmp_path / 'missing', tmp_path / 'a'])
    write_run(tmp_path / 'b' / 'x', np.ones(4, dtype=bool), lr=1.0)
    write_run(tmp_path / 'b' / 'y', np.ones(4, dtype=bool), lr=2.0)
    with pytest.raises(InputError, match=r"b' holds 2 runs \(x, y\): name one"):
        compare_runs([tmp_path / 'b', tmp_path / 'a'])
    with pytest.raises(SystemExit):
        main(['compare', 'a', 'b', 'c'])
    assert capsys.readouterr().err.endswith('error: 3 runs given: name two runs, or one that has a twin.\n')
    (tmp_path / 'torn.json').write_text('{"images": ["a"]')
    with pytest.raises(InputError, match=r"torn.json' is no file of outcomes by image"):
        read_outcomes(tmp_path / 'torn.json')


@pytest.mark.slow
def test_runs_as_training_leaves_them(tmp_path):
    """Outcomes are kept at the end of training, made again from the checkpoint where they are missing, and the same."""
    from moe_zoo.engine.train import train
    data = write_images(tmp_path / 'data', {'train': 8, 'validation': 4, 'test': 3})
    recipe = dict(model='vmoe_vit_s', img_size=16, batch_size=8, workers=0, opt='adamw', lr=1e-3, epochs=2,
                  warmup_epochs=0, device='cpu', model_ema=True, data_dir=str(data), model_kwargs=dict(
                      patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1], num_experts=4,
                      representation_size=0))
    for name, rate in (('a', 1e-3), ('b', 1e-2)):
        train(recipe, {'lr': rate}, output=tmp_path / name, quiet=True)
    kept = read_outcomes(tmp_path / 'a' / FILE)
    last = [row.split(',') for row in (tmp_path / 'a' / 'summary.csv').read_text().splitlines()]
    assert 100 * kept.right.mean() == float(last[-1][last[0].index('eval_ema_top1')])  # of the average, as the results
    assert kept.images[0] == 'bright/00.png' and len(kept) == 8
    (tmp_path / 'a' / FILE).unlink()
    _, found = compare_runs([tmp_path / 'a', tmp_path / 'b'])
    again = read_outcomes(tmp_path / 'a' / FILE)
    assert again.images == kept.images and np.array_equal(again.likeliest, kept.likeliest) and found.images == 8
    _, other = compare_runs([tmp_path / 'a', tmp_path / 'b'], {'val_split': 'test'})
    assert other.images == 6 and len(read_outcomes(tmp_path / 'a' / FILE)) == 8  # which stay those of the run
