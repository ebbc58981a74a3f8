"""The built-in recipes: real data, stable splits, models of the stated shapes, summed losses."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launcher.recipes.digits import Digits
from launcher.recipes.gpt import Gpt
from launcher.recipes.images import ImageFolder
from launcher.recipes.mlp import Mlp
from launcher.recipes.resnet import ResNet
from launcher.recipes.text import Text
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from launcher.errors import UsageError
from launcher.plan.training_plan import DatasetSizes
from launcher.recipe import find_unlearned_defaults, get_dataset_sizes
from launcher.train.seeded_dataset import collate_or_passthrough


def first_batch(recipe, count: int):
    """Return a batch of the first `count` training samples, as the data loader makes it."""
    return next(iter(DataLoader(recipe.dataset("train"), count, collate_fn=collate_or_passthrough)))


def count_parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Common to all recipes


@pytest.mark.parametrize(("recipe", "expected"), [(Gpt(), ["recipe.data"]), (ResNet(), ["recipe.data"]), (Mlp(), [])])
def test_data_may_move_during_a_run(recipe, expected):
    assert list(find_unlearned_defaults(recipe)) == expected


def test_sizes_are_known_without_torch():
    code = (
        "import sys; from launcher.recipe import build_recipe, get_dataset_sizes\n"
        "for name in ('resnet.ResNet', 'gpt.Gpt', 'mlp.Mlp'):\n"
        "    get_dataset_sizes(build_recipe({'_target_': f'launcher.recipes.{name}'}))\n"
        "assert not {'torch', 'sklearn', 'PIL'} & set(sys.modules), 'a plan would wait for it'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("recipe", [ResNet(), Gpt(), Mlp(), Mlp(classes=3), Mlp(subset=100), Mlp(validation_split=0)])
def test_stated_size_matches_dataset(recipe):
    for split in ("train", "val"):
        assert recipe.size(split) == len(recipe.dataset(split))


@pytest.mark.parametrize("recipe", [ResNet(), Gpt(), Mlp()])
def test_loss_is_a_sum(recipe):
    torch.manual_seed(0)
    model = recipe.model().eval()  # eval: batch norm would mix the samples
    whole = first_batch(recipe, 6)
    parts = [tuple(tensor[some] for tensor in whole) for some in (slice(0, 2), slice(2, 6))]
    total, halves = recipe.loss(model, whole), [recipe.loss(model, part) for part in parts]
    torch.testing.assert_close(total.total, sum(half.total for half in halves))
    assert total.total.requires_grad
    assert total.count == sum(half.count for half in halves)
    assert total.metrics["accuracy"] == sum(half.metrics["accuracy"] for half in halves)


@pytest.mark.parametrize("recipe", [ResNet(), Gpt(), Mlp()])
def test_getitems_matches_default_collate(recipe):
    data = recipe.dataset("train")
    for ready, collated in zip(
        data.__getitems__([5, 3, 3]), default_collate([data[i] for i in (5, 3, 3)]), strict=True
    ):
        assert torch.equal(ready, collated)
    assert data.deterministic


# The digits


def test_digits_contain_every_sample_once():
    rows = Digits().rows("train") + Digits().rows("val")
    assert sorted(rows) == list(range(1797))
    assert get_dataset_sizes(Mlp()) == DatasetSizes(1437, 360, None)
    images, labels = Digits().dataset("train")[:]
    assert images.shape == (1437, 1, 8, 8)
    assert images.dtype == torch.float32
    assert abs(float(images.mean())) < 0.05
    assert abs(float(images.std()) - 1) < 0.05
    assert labels.unique().tolist() == list(range(10))


def test_digits_split_is_deterministic():
    assert Digits().rows("val")[:5] == Digits().rows("val")[:5]
    assert Digits(subset=10).rows("val") == Digits().rows("val")
    assert Digits(split_seed=1).rows("val") != Digits().rows("val")


def test_digits_support_fewer_classes_and_samples():
    assert set(Digits(classes=3).dataset("train").targets.tolist()) == {0, 1, 2}
    assert Digits(subset=10).rows("train") == Digits().rows("train")[:10]


@pytest.mark.parametrize(
    "fields", [{"subset": 0}, {"classes": 11}, {"classes": 1}, {"validation_split": 1.0}, {"validation_split": -0.1}]
)
def test_invalid_digits_fields_are_refused(fields):
    with pytest.raises(UsageError, match=f"recipe.{next(iter(fields))}="):
        Mlp(**fields)


def test_missing_scikit_learn_is_reported(monkeypatch):
    from launcher.recipes import digits

    digits.load_table.cache_clear()
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install scikit-learn"):
        digits.load_table()


# ResNet


@pytest.mark.parametrize(("depth", "millions"), [(18, 11.69), (34, 21.80), (50, 25.56)])
def test_full_width_resnet_has_published_parameter_count(depth, millions):
    from launcher.recipes.resnet_model import resnet

    with torch.device("meta"):
        assert round(count_parameters(resnet(depth, 64, 3, 1000, "batch", large=True)) / 1e6, 2) == millions


@pytest.mark.parametrize("fields", [{}, {"depth": 34}, {"depth": 50, "norm": "group"}, {"stem": "large"}])
def test_resnet_outputs_one_logit_per_class(fields):
    recipe = ResNet(**fields)
    assert recipe.model()(first_batch(recipe, 4)[0]).shape == (4, 10)


@pytest.mark.parametrize(("size", "shape"), [(8, (8, 8)), (16, (16, 16)), ((12, 20), (12, 20)), (None, (8, 8))])
def test_digits_are_resized_to_image_size(size, shape):
    recipe = ResNet(image_size=size, subset=4)
    assert recipe.dataset("train")[0][0].shape == (1, *shape)
    assert recipe.synthetic("train")[0][0].shape == (1, *shape)


def test_stem_follows_image_size():
    assert ResNet(image_size=224).model()[0].kernel_size == (7, 7)
    assert ResNet(image_size=32).model()[0].kernel_size == (3, 3)


def test_group_norm_is_independent_of_batch():
    model = ResNet(norm="group").model()
    assert not list(model.buffers())
    images = first_batch(ResNet(), 4)[0]
    torch.testing.assert_close(model(images)[:1], model(images[:1]))


@pytest.mark.parametrize("fields", [{"image_size": 0}, {"width": 0}, {"width": 12, "norm": "group"}])
def test_invalid_resnet_fields_are_refused(fields):
    with pytest.raises(UsageError, match=r"recipe\.(image_size|width)="):
        ResNet(**fields)


# A folder of images


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(20):
            Image.new("RGB", (20 + index, 30), (index, 0, 0)).save(tmp_path / name / f"{index}.png")
    return tmp_path


def test_image_split_is_disjoint(image_folder: Path):
    images = ImageFolder(str(image_folder))
    train, val = images.files("train"), images.files("val")
    assert len(train) + len(val) == 40
    assert not set(train) & set(val)
    assert 0 < len(val) < 20
    assert get_dataset_sizes(ResNet(data=str(image_folder))) == DatasetSizes(len(train), len(val), None)


def test_image_split_is_independent_of_location(image_folder: Path, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "moved"
    before = [
        (Path(file).relative_to(image_folder), label) for file, label in ImageFolder(str(image_folder)).files("val")
    ]
    image_folder.rename(other)
    after = [(Path(file).relative_to(other), label) for file, label in ImageFolder(str(other)).files("val")]
    assert before == after
    assert ImageFolder(str(other), split_seed=1).files("val") != ImageFolder(str(other)).files("val")


def test_existing_train_and_val_folders_are_used(tmp_path: Path):
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("L", (8, 8)).save(tmp_path / split / name / f"{index}.jpg")
    recipe = ResNet(data=str(tmp_path), image_size=(16, 24))
    assert get_dataset_sizes(recipe) == DatasetSizes(6, 4, None)
    image, label = recipe.dataset("val")[3]
    assert (image.shape, image.dtype, label) == ((3, 16, 24), torch.float32, 1)
    assert recipe.model()(image[None]).shape == (1, 2)
    (tmp_path / "val" / "bird").mkdir()
    with pytest.raises(UsageError, match="val/bird is a class that train/ does not have"):
        recipe.size("val")


def test_only_training_images_are_augmented(image_folder: Path):
    recipe = ResNet(data=str(image_folder))
    train, val = recipe.dataset("train"), recipe.dataset("val")
    assert (train.deterministic, val.deterministic) == (False, True)
    assert torch.equal(val[0][0], val[0][0])
    assert ResNet(data=str(image_folder), augment="none").dataset("train").deterministic


def test_augmentation_follows_torch_seed(image_folder: Path):
    gradient = Image.linear_gradient("L")
    gradient.save(image_folder / "cat" / "0.png")
    gradient.save(image_folder / "cat" / "1.png")
    data = ResNet(data=str(image_folder)).dataset("train")

    def drawn(seed: int):
        torch.manual_seed(seed)
        return torch.stack([data[0][0], data[1][0]])

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


def test_missing_image_folder_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="is not a folder"):
        ResNet(data=str(tmp_path / "nowhere")).size("train")


def test_image_folder_without_classes_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="has no class folders"):
        ResNet(data=str(tmp_path)).size("train")


def test_class_without_images_is_refused(image_folder: Path):
    (image_folder / "empty").mkdir()
    with pytest.raises(UsageError, match="class empty has no training images"):
        ResNet(data=str(image_folder)).size("train")


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n cut off"])
def test_corrupt_image_is_named(image_folder: Path, content: bytes):
    for file in (image_folder / "cat").iterdir():
        file.write_bytes(content)
    with pytest.raises(UsageError, match=r"cat/\d+\.png cannot be read as an image"):
        ResNet(data=str(image_folder)).dataset("train")[0]


def test_truncated_image_is_named(image_folder: Path):
    for file in (image_folder / "cat").iterdir():
        Image.effect_noise((64, 64), 50).save(file)
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"cat/\d+\.png cannot be read as an image"):
        ResNet(data=str(image_folder)).dataset("train")[0]


def test_fifo_among_images_is_refused(image_folder: Path):
    os.mkfifo(image_folder / "cat" / "pipe.png")
    with pytest.raises(UsageError, match=r"pipe\.png is not a regular file"):
        ResNet(data=str(image_folder)).size("train")


# GPT


def test_gpt_small_has_gpt2_parameter_count():
    with torch.device("meta"):
        model = Gpt(layers=12, heads=12, width=768, block=1024, vocabulary=50257).model()
    assert count_parameters(model) == 124_439_808


def test_gpt_head_is_tied_to_embedding():
    model = Gpt().model()
    assert model.head.weight is model.tokens.weight


def test_untrained_gpt_predicts_uniformly():
    torch.manual_seed(0)
    recipe = Gpt()
    loss = recipe.loss(recipe.model(), first_batch(recipe, 16))
    assert loss.count == recipe.count(first_batch(recipe, 16)) == 16 * 64
    assert abs(loss.total.item() / loss.count - math.log(256)) < 0.1


def test_residual_projections_start_smaller():
    torch.manual_seed(0)
    block = Gpt(layers=8).model().blocks[0]
    assert float(block.attention.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(block.attention.out.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.05)


def test_attention_is_causal():
    model = Gpt().model()
    tokens = torch.randint(256, (1, 64))
    changed = tokens.clone()
    changed[0, 40:] = 0
    torch.testing.assert_close(model(tokens)[0, :40], model(changed)[0, :40])


def test_text_blocks_do_not_overlap(tmp_path: Path):
    (tmp_path / "text.txt").write_bytes(bytes(range(95)))
    text = Text(block=4, limit=1000, path=str(tmp_path / "text.txt"), validation_split=0.1)
    assert (text.size("train"), text.size("val")) == (17, 2)
    inputs, targets = text.blocks("train").__getitems__([0, 1])
    assert inputs.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert targets.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert text.blocks("val")[1][1].tolist() == [91, 92, 93, 94]


def test_text_folder_is_read_in_name_order(tmp_path: Path):
    for name, text in (("b.md", "bb"), ("a.txt", "aa"), ("c.py", "cc"), ("d.bin", "dd")):
        (tmp_path / name).write_text(text)
    assert Text(1, 5, str(tmp_path)).read() == b"aabbc"


def test_default_text_is_python_standard_library():
    assert b"import" in Text(64, 300_000).read()
    assert get_dataset_sizes(Gpt()) == DatasetSizes(4153, 462, 64)


def test_missing_or_short_text_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="does not exist"):
        Gpt(data=str(tmp_path / "nowhere")).size("train")
    with pytest.raises(UsageError, match="gives 0 bytes of text"):
        Gpt(data=str(tmp_path)).size("train")


def test_fifo_among_texts_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UsageError, match=r"pipe\.txt is not a regular file"):
        Gpt(data=str(tmp_path)).size("train")


@pytest.mark.parametrize("fields", [{"heads": 3}, {"heads": 0}, {"vocabulary": 100}, {"block": 0}])
def test_invalid_gpt_fields_are_refused(fields):
    with pytest.raises(UsageError, match=f"recipe.{next(iter(fields))}="):
        Gpt(**fields)


# The perceptron


def test_mlp_has_configured_depth():
    assert [tuple(p.shape) for p in Mlp(hidden=32, depth=2).model().parameters() if p.ndim == 2] == [
        (32, 64),
        (32, 32),
        (10, 32),
    ]


def test_rprop_learns_the_digits():
    torch.manual_seed(0)
    recipe = Mlp()
    model, data, held_out = recipe.model(), recipe.dataset("train"), recipe.dataset("val")
    optimizer = torch.optim.Rprop(model.parameters(), lr=0.001)
    for _ in range(40):
        loss = recipe.loss(model, data[:])
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
    found = recipe.loss(model.eval(), held_out[:])
    assert float(found.metrics["accuracy"]) / found.count > 0.9
