import importlib.util
import io
import json
import os
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import resseq
from resseq import publication
from resseq.ablation.grid import as_options, cells_of
from resseq.cli import main
from resseq.data.baseline import pixel_baseline
from resseq.data.batching import Images
from resseq.data.corpus import prepare
from resseq.data.image import ImageOptions, decode, load_images, read_picture
from resseq.models import check_model
from resseq.models.image_classifier import ImageClassifier, shift_and_mirror
from resseq.options import TrainOptions
from resseq.run import Run
from resseq.training.loop import Trainer

COLOURS = {"blue": (30, 40, 200), "red": (200, 40, 30)}
SMALL = {
    "task": "image",
    "model": "cifar-resnet",
    "depth": 8,
    "dim": 4,
    "per_device_train_batch_size": 8,
    "max_steps": 8,
    "eval_steps": 4,
    "warmup_steps": 0,
    "learning_rate": 1e-2,
    "device": "cpu",
}


def draw(colour, size=(8, 8), mode="RGB", seed=0):
    noise = torch.randint(0, 50, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((noise + torch.tensor(COLOURS[colour])).byte().numpy()).convert(mode)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_folder(folder, count=20, split=""):
    for name in COLOURS:
        (folder / split / name).mkdir(parents=True)
        for i in range(count):
            draw(name, seed=i).save(folder / split / name / f"{i:03}.png")
    return str(folder)


def write_parquet(path, count=20):
    """As Hugging Face datasets writes it: a struct, and the classes' names in the metadata."""
    images = [{"bytes": png(draw(name, seed=i)), "path": None} for name in COLOURS for i in range(count)]
    table = pa.table({"img": images, "label": [i // count for i in range(2 * count)]})
    features = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(COLOURS)}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(about), path)
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "colours", 40)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, resseq.train(data=data, output_dir=str(folder), **SMALL)


def test_it_learns_and_leaves_a_run_folder(run):
    folder, result = run
    assert result["rows"] == {"train": 64, "validation": 8, "test": 8}
    assert result["test"]["accuracy"] == 1.0
    assert set(result["baselines"]) == {"majority", "pixels"}
    stored = json.loads((folder / "image.json").read_text())
    assert (stored["size"], stored["augment"]) == (8, True)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "8 x 8, RGB, mirrored and shifted" in card
    assert not (folder / "tokenizer.json").exists()


def test_evaluate_measures_the_rows_held_out(run, tmp_path):
    folder, result = run
    own = resseq.evaluate(str(folder))
    assert {name: own[name] for name in ("loss", "accuracy", "macro_f1")} == pytest.approx(result["test"])
    other = resseq.evaluate(str(folder), data=write_parquet(tmp_path / "other.parquet", 5))
    assert (other["rows"], other["split"], other["accuracy"]) == (10, "all", 1.0)
    with pytest.raises(ValueError, match=r"evaluate: a run on images has no text column; got text_column='x'\. Leave"):
        resseq.evaluate(str(folder), text_column="x")


def test_predict_takes_paths_and_images(run, data, tmp_path, capsys):
    folder, _ = run
    paths = [f"{data}/red/000.png", f"{data}/blue/001.png"]
    rows = list(resseq.predict(str(folder), paths))
    assert [row["label"] for row in rows] == ["red", "blue"]
    assert rows == list(resseq.predict(str(folder), [Image.open(path) for path in paths]))
    (tmp_path / "paths.txt").write_text("\n".join(paths) + "\n")
    assert main(["predict", str(folder), str(tmp_path / "paths.txt")]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert [row["label"] for row in resseq.predict(str(folder), paths[0])] == ["red"], "one image is one image"
    assert main(["predict", str(folder), str(tmp_path / "none.txt")]) == 1
    with pytest.raises(ValueError, match=r"data: an image must be a file that can be read; got none.png: No such file"):
        list(resseq.predict(str(folder), ["none.png"]))


def test_an_exported_file_says_what_the_run_says(run, tmp_path, monkeypatch):
    file = tmp_path / "model.pt2"
    said = resseq.export(run[0], file)
    assert said["images"] == 8
    program, model = torch.export.load(file).module(), Run.load(run[0], "cpu").model
    for batch in (1, 3):
        images = torch.randint(256, (batch, 3, 8, 8), dtype=torch.uint8)
        torch.testing.assert_close(program(images), model(images))
    monkeypatch.setattr(publication, "held_out", fail_with(ValueError("its data is not here")))
    assert resseq.export(run[0], file)["images"] == 4


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("onnxscript"), reason="the extra [onnx] is not installed")
def test_onnx_says_what_the_run_says(run, tmp_path):
    assert resseq.export(run[0], tmp_path / "model.onnx")["largest_difference"] < 1e-4


def fail_with(error):
    def fail(*args, **options):
        raise error

    return fail


def test_a_run_that_was_stopped_goes_on_exactly(run, data, tmp_path, monkeypatch):
    folder, _ = run
    validate = Trainer.validate

    def stop(trainer):
        if trainer.step == 8:
            raise KeyboardInterrupt
        validate(trainer)

    monkeypatch.setattr(Trainer, "validate", stop)
    again = {"data": data, "output_dir": str(tmp_path / "again"), "resume": "auto", **SMALL}
    with pytest.raises(KeyboardInterrupt):
        resseq.train(**again)
    assert [path.name.split("-")[1].lstrip("0") for path in (tmp_path / "again").glob("checkpoint-*")] == ["4"]
    monkeypatch.setattr(Trainer, "validate", validate)
    resseq.train(**again)
    ours, theirs = (Run.load(str(path), "cpu").model.state_dict() for path in (folder, tmp_path / "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_same_images_come_from_parquet_and_from_folders(tmp_path):
    folder, parquet = write_folder(tmp_path / "folder"), write_parquet(tmp_path / "colours.parquet")
    ours, theirs = (prepare(ImageOptions(task="image", data=each)) for each in (folder, parquet))
    assert ours.classes == theirs.classes == ["blue", "red"]
    assert ours.fingerprint == theirs.fingerprint
    assert torch.equal(ours.splits["train"].pixels, theirs.splits["train"].pixels)
    pixels = ours.splits["train"].pixels.double().transpose(0, 1).flatten(1) / 255
    assert ours.reader.mean == pytest.approx(pixels.mean(1).tolist())
    assert ours.reader.std == pytest.approx(pixels.std(1, correction=0).tolist())


def test_folders_of_splits_are_kept(tmp_path):
    write_folder(tmp_path, 5, "train")
    write_folder(tmp_path, 3, "test")
    corpus = prepare(ImageOptions(task="image", data=str(tmp_path)))
    assert (corpus.carved, corpus.rows) == (("validation",), {"train": 9, "validation": 1, "test": 6})


def test_what_lies_beside_the_folders_of_labels_is_no_image(tmp_path):
    write_folder(tmp_path, 1, "train")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    for name in ("train/contact-sheet.png", "train/red/._000.png", "train/.ipynb_checkpoints/000.png"):
        draw("red").save(tmp_path / name)
    data = load_images(ImageOptions(data=str(tmp_path)), carve=False)
    assert (data.classes, data.splits["train"].labels) == (["blue", "red"], [0, 1])


def test_no_class_is_left_out(tmp_path):
    for name in (
        "cat/0.png",
        "fox/0.JFIF",
        "unsup/0.png",
        os.fsdecode(b"caf\xe9/0.png"),
        os.fsdecode(b"caf\xe8/0.png"),
    ):
        (tmp_path / name).parent.mkdir()
        draw("red").save(tmp_path / name, "JPEG" if "fox" in name else "PNG")
    data = load_images(ImageOptions(data=str(tmp_path)), carve=False)
    assert data.classes == ["caf\\udce8", "caf\\udce9", "cat", "fox", "unsup"]


def test_a_row_without_an_image_to_predict_is_named(run):
    with pytest.raises(ValueError, match="every row must name an image; got none in rows 2, 3. Fill the row."):
        list(resseq.predict(str(run[0]), [draw("red"), "", None]))


def test_images_of_other_sizes_and_colours_become_alike(tmp_path):
    names = {
        "wide.png": draw("red", (20, 10)),
        "grey.png": draw("red", mode="L"),
        "clear.png": draw("red", mode="RGBA"),
    }
    for name, image in names.items():
        image.save(tmp_path / name)
    pixels = decode([read_picture(tmp_path / name) for name in names], 8)
    assert (pixels.shape, pixels.dtype) == ((3, 3, 8, 8), torch.uint8)
    assert torch.equal(pixels[1, 0], pixels[1, 1])
    assert torch.equal(pixels[2], decode([draw("red")], 8)[0])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("ink", [0, 255])
def test_a_drawing_on_nothing_is_seen(tmp_path, mode, ink):
    drawn = torch.eye(8, dtype=torch.uint8) * 255
    image = Image.merge("LA", [Image.new("L", (8, 8), ink), Image.fromarray(drawn.numpy())])
    if mode == "P":
        image = Image.fromarray(drawn.numpy() // 255).convert("P")  # two colours, of which the first is transparent
        image.putpalette([9, 9, 9, ink, ink, ink])
        image.save(tmp_path / "icon.png", transparency=0)
    else:
        image.convert(mode).save(tmp_path / "icon.png")
    pixels = decode([read_picture(tmp_path / "icon.png")], 8)[0]
    assert torch.equal(pixels, torch.where(drawn > 0, ink, 128).byte().expand(3, 8, 8))


def test_what_a_camera_held_upright_took_is_upright(tmp_path):
    turned, orientation = draw("red", (6, 4)), Image.Exif()
    orientation[0x0112] = 6  # to be shown turned by 90 degrees, clockwise
    turned.save(tmp_path / "photo.png", exif=orientation)
    pixels = decode([read_picture(tmp_path / "photo.png")], 4)
    assert torch.equal(pixels, decode([turned.rotate(-90, expand=True)], 4))
    assert not torch.equal(pixels, decode([turned], 4))


def test_a_test_image_that_stands_in_training_under_another_name_is_counted(tmp_path):
    write_folder(tmp_path, 5, "train")
    write_folder(tmp_path, 2, "test")
    (tmp_path / "test" / "red" / "001.png").rename(tmp_path / "test" / "red" / "another.png")
    draw("red", seed=9).save(tmp_path / "test" / "red" / "000.png")
    assert prepare(ImageOptions(task="image", data=str(tmp_path), validation_fraction=0.1)).repeated == 3


def test_an_image_of_more_than_8_bits_is_refused(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"must have 8 bits a channel; got .*deep\.png, which has more .*Convert it"):
        decode([read_picture(tmp_path / "deep.png")], 8)


def test_texts_are_no_images():
    with pytest.raises(ValueError, match="--task image needs images; got data='pystdlib', which is texts. Give --data"):
        prepare(ImageOptions(task="image"))


def test_images_that_differ_in_size_get_the_usual_one(tmp_path):
    write_folder(tmp_path, 5)
    draw("red", (30, 20)).save(tmp_path / "red" / "wide.png")
    corpus = prepare(ImageOptions(task="image", data=str(tmp_path), validation_fraction=0.2, test_fraction=0.2))
    assert corpus.reader.size == 224
    assert prepare(ImageOptions(task="image", data=str(tmp_path), image_size=12)).reader.size == 12


@pytest.mark.parametrize("content", [b"no image", None])
def test_a_damaged_image_is_named(tmp_path, content):
    write_folder(tmp_path, 5)
    file = tmp_path / "red" / "003.png"
    file.write_bytes(content or file.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"data: an image must be whole, of a known format; got {file}: .*\. Mend it"):
        prepare(ImageOptions(task="image", data=str(tmp_path)))


def test_a_label_that_training_lacks_is_refused(run, tmp_path):
    write_folder(tmp_path, 3)
    (tmp_path / "red").rename(tmp_path / "green")
    with pytest.raises(ValueError, match=r"every label must be in the classes; got labels=\['green'\]"):
        resseq.evaluate(str(run[0]), data=str(tmp_path))


def test_a_column_that_holds_no_image_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("image,label\nx,y\n")
    with pytest.raises(ValueError, match="data: an image is a struct of bytes and path; got a str in .*a.csv, row 1"):
        load_images(ImageOptions(data=str(tmp_path / "a.csv")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "transformer"},
            "--model transformer reads texts; got --task image. Use --model cifar-resnet, or --task text",
        ),
        ({"tokenizer": "byte"}, r"train: --task image has no --tokenizer; got 'byte'\. Leave it out\."),
        (
            {"task": "text", "model": "convnet", "image_size": 8},
            "--task text has no --image-size; got 8. Leave it out.",
        ),
        ({"depth": 9}, "cifar_resnet: depth must be 6n"),
        ({"heads": 2}, "model: --model cifar-resnet has no heads; got --heads 2. Leave it out."),
        ({"model": "resnet18", "depth": 18}, "model: --model resnet18 has no depth; got --depth 18. Leave it out."),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_model(TrainOptions(**{"task": "image", "model": "cifar-resnet"} | options))


def test_the_augmentation_shifts_and_mirrors():
    x = torch.arange(64.0).view(1, 1, 8, 8).repeat(200, 2, 1, 1) + 1
    torch.manual_seed(0)
    moved = shift_and_mirror(x, 4)
    assert moved.shape == x.shape
    assert moved.is_contiguous(memory_format=torch.channels_last)
    padded = torch.nn.functional.pad(x[0], [4] * 4)
    windows = [padded[:, i : i + 8, j : j + 8] for i in range(9) for j in range(9)]
    found = {
        next(
            (k, flip)
            for k, window in enumerate(windows)
            for flip in (False, True)
            if torch.equal(each, window.flip(2) if flip else window)
        )
        for each in moved
    }
    assert len({k for k, _ in found}) > 60
    assert {flip for _, flip in found} == {False, True}
    assert all(torch.equal(each, x[0]) or torch.equal(each, x[0].flip(2)) for each in shift_and_mirror(x, 0))


def test_only_training_is_augmented_and_pixels_are_normalised():
    model = ImageClassifier(torch.nn.Identity(), [0.5, 0.0, 0.0], [0.5, 1.0, 1.0]).eval()
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(model(images)[:, 0], images[:, 0] / 127.5 - 1)
    torch.testing.assert_close(model(images)[:, 1:], images[:, 1:] / 255)
    assert not torch.equal(model.train()(images), model.eval()(images))


def test_the_linear_baseline_reads_the_colours():
    pixels = torch.randint(256, (60, 3, 8, 8), dtype=torch.uint8)
    labels = (pixels[:, 0].float().mean((1, 2)) > 127).long().tolist()
    images = Images(pixels, labels)
    assert pixel_baseline(images, images, classes=2) > 0.95
    one = Images(pixels[:1], labels[:1])
    assert pixel_baseline(one, one, classes=2) == 1


def test_a_grid_of_images(data, tmp_path):
    own = ("depth", "max_steps", "eval_steps", "learning_rate")
    options = {name: value for name, value in SMALL.items() if name not in own}
    found = resseq.ablate(data=data, depths=8, max_steps=4, output_dir=str(tmp_path), workers=1, **options)
    assert list(found.frame["scheme"]) == ["plain", "residual"]
    assert set(found.frame["status"]) <= {"finished", "stuck"}
    assert (found.frame["gradient_norm_first"] > 0).all()
    assert "a linear map of 8 x 8 pixels" in found.summary


def test_a_cell_has_the_defaults_of_its_model(tmp_path):
    options = as_options(task="image", data="x", output_dir=str(tmp_path))
    cells = [cell.options for cell in cells_of(options)]
    assert [(each.scheme, each.depth) for each in cells] == list(product(("plain", "residual"), (20, 56)))
    assert {(each.model, each.dim, each.shortcut, each.max_length) for each in cells} == {
        ("cifar-resnet", 16, "A", 256)
    }
    assert options.command == f"resseq ablate --data x --task image --output-dir {tmp_path}"


def test_inspect_reads_a_run_on_images(run):
    report = resseq.inspect(str(run[0]), texts=8, device="cpu")
    assert len(report.frame) >= 3
